"""Find the config fields that count prediction heads, by the heads' tensors in the base's files.

transformers does not load heads that predict further tokens, so their weights are not saved. A config that still
declared them would make other programs look for these weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from llmprune.anatomy.config_edits import counts_heads
from llmprune.anatomy.meta_model import text_config
from llmprune.checkpoint.result.config_file import ConfigChange, leaves
from llmprune.checkpoint.weight_headers import headers_of_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORD = re.compile(r"[a-z0-9]{3,}")
_COMMON = {"model", "language", "text", "layer", "layers", "block", "blocks", "head", "heads", "num", "weight", "bias"}
_PREDICTS = {"predict", "predictor", "next", "nextn", "mtp", "draft", "extra", "speculative"}


def fields_of_left_heads(change: ConfigChange, model: PreTrainedModel, *, layers_path: str) -> dict[str, int]:
    """Return the config fields, with their values, that count heads in the base's files which are not loaded.

    A field counts heads if its name is that of such a count, or if it shares a word with a head's tensors and its value
    is their number. Fields that the cut config no longer has are left out.
    """
    count = text_config(change.before).num_hidden_layers
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    heads = _heads(headers_of_folder(change.base, str(change.base)), patterns, layers_path=layers_path, layers=count)
    after = dict(leaves(change.after))
    return {
        place[-1]: value
        for place, value in leaves(change.before)
        if type(value) is int and value > 0 and after.get(place) == value and _counts(place[-1], value, heads=heads)
    }


def describe_heads(fields: Collection[str]) -> str:
    """Return a note that the heads which these fields declare are not part of the result."""
    return (
        f"the base's heads that predict further tokens ({', '.join(fields)} in its config) are not part of the result: "
        "transformers does not load their weights, and the result's config declares none"
    )


def _counts(name: str, value: int, *, heads: list[tuple[set[str], int]]) -> bool:
    words = set(_WORD.findall(name)) - _COMMON
    return bool(heads) and (counts_heads(name) or any(words & head and value == count for head, count in heads))


def _heads(
    names: Iterable[str], patterns: list[re.Pattern[str]], *, layers_path: str, layers: int
) -> list[tuple[set[str], int]]:
    """Return the words in the name, and the number of modules, of each module list that is stored and not loaded."""
    found: dict[str, set[str]] = defaultdict(set)
    list_name = layers_path.rpartition(".")[-1]
    for name in names:
        if any(pattern.search(name) for pattern in patterns):
            path, index = _first_index(name)
            in_decoder = path.rpartition(".")[-1] == list_name and index != ""
            if not in_decoder or int(index) >= layers:  # others are unused tensors of a layer
                found[path].add(index)
    return [
        (_PREDICTS if path.rpartition(".")[-1] == list_name else set(_WORD.findall(path)) - _COMMON, len(indices))
        for path, indices in found.items()
    ]


def _first_index(name: str) -> tuple[str, str]:
    """Return a tensor's path before its first index, and that index."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), part
    return parts[0], ""
