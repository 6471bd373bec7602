"""Refuse configs that describe too much, from the raw JSON, before transformers reads them.

A config decides how many modules, list entries and real buffers are built, and it comes from the owner of the
repository. The limits are several times the sizes of the largest published models. They do not bound memory: where the
service plans for its users, a process limit does.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.common.errors import ModelError
from llmprune.common.schema import format_size

MOST_BYTES = 8 * 10**6  # a config that lists every quantized expert has about 5 MB
MOST_ENTRIES = 65_536  # of a list: settings by layer, labels, modules; transformers checks each
MOST_NESTED = 32  # configs of several modalities have 6
_COUNTS = (  # (pattern of keys, largest number); the first pattern that matches decides
    (re.compile(r"(?<!per_)layers?$|(?<!per_)blocks?$|depths?$|stages?$|cycles$"), 1_024),  # Llama 3.1 405B has 126
    (re.compile(r"experts?$|heads?$|labels$"), 65_536),  # Doge has 16,384 experts, mgp-str 50,257 labels
    (re.compile(r"vocab"), 2**26),  # n-gram vocabularies have 20 million
)
# Words in transformers' names of fields that size a layer, a buffer or a list. Other numbers have no limit: token ids,
# lengths, and notes of the model's authors.
_SIZE = re.compile(
    r"(?:^|_)(?:num|n|d|hc)_|_num(?:ber)?$|size|dim|width|channel|chans|planes|resolution|shape|rank|inner|embd|embed|emb_"
    r"|groups?(?:_|$)|ffn|(?:^|_)d?ff|conv_|kernel|stride|dilat|rates$|kpool|cca_time|temporal|levels$|units|features|bins$"
    r"|buckets|codebook|types$|mult|factor|ratios?$|expan[ds]|divisor|reduction|repeats$|times$|average|ngram|blocks_"
    r"|dense_replace|idx$|indices$|indexes$"
)
_NO_SIZE = re.compile(  # keys with such a word that are no sizes: lengths of text, and statistics of the training
    r"positions?(?:_embeddings?)?$|length$|ctx$|window_size|chunk_?size|base$|(?:^|_)total_|^(?:num|n)_tokens$|^model_size$"
    r"|(?:^|_)(?:params?|parameters|train(?:ed|ing)?|seen|steps|samples|examples|documents|sequences|epochs|updates"
    r"|iterations|flops|bytes|file|dataset|corpus|batch|shard|download)(?:_|$)"
)
_MOST_SIZE = 2**24  # 16.8 million
_CLIPPED = 100  # characters of a key that are matched and shown


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value of a config, its place in words, the key that it belongs to, and its depth."""

    place: str
    key: str
    value: Any
    depth: int


def check_config_file(path: Path, model: str) -> None:
    """Raise ModelError where a model's ``config.json`` exceeds a limit; pass where there is none."""
    if not path.is_file():
        return
    if path.stat().st_size > MOST_BYTES:
        raise _too_large(model, f"it has {format_size(path.stat().st_size)}", most=format_size(MOST_BYTES))
    try:
        config = json.loads(path.read_bytes())
    except RecursionError:
        raise _too_large(model, "it is nested hundreds deep", most=f"{MOST_NESTED} levels") from None
    except ValueError:
        return  # transformers reports the fault
    check_config(config, model)


def check_config(config: Any, model: str) -> None:
    """Raise ModelError where a config, as read from JSON, exceeds a limit or names another config file."""
    if isinstance(config, dict) and "configuration_files" in config:
        raise ModelError(
            f"the config of {model} names other files to be read in its place (configuration_files); "
            "take a checkpoint with a complete config.json"
        )
    for entry in _entries(config):
        place, value = entry.place or "it", entry.value
        if entry.depth > MOST_NESTED:
            raise _too_large(model, f"{place} is nested deeper", most=f"{MOST_NESTED} levels")
        if isinstance(value, list) and len(value) > MOST_ENTRIES:
            raise _too_large(model, f"{place} has {len(value):,} entries", most=f"{MOST_ENTRIES:,}")
        if isinstance(value, int | float) and value > (most := _most(entry.key, isinstance(value, int))):
            raise _too_large(model, f"{place} is {_shown(value)}", most=f"{most:,}")


def _entries(config: Any) -> Iterator[_Entry]:
    """Yield every value of a config, without recursion."""
    pending = [_Entry("", "", config, 0)]
    while pending:
        entry = pending.pop()
        yield entry
        if isinstance(entry.value, dict):
            for name, inner in entry.value.items():
                place = f"{entry.place}.{name[:_CLIPPED]}".lstrip(".")[-_CLIPPED:]
                pending.append(_Entry(place, name[-_CLIPPED:], inner, entry.depth + 1))
        elif isinstance(entry.value, list):
            pending += [_Entry(entry.place, entry.key, inner, entry.depth + 1) for inner in entry.value]


def _most(key: str, whole: bool) -> float:
    """Return the limit of a number under a key: infinite where it sizes nothing; fractions are limited in counts."""
    counted = next((most for pattern, most in _COUNTS if pattern.search(key)), None)
    if counted is not None:
        return counted
    return _MOST_SIZE if whole and _SIZE.search(key) and not _NO_SIZE.search(key) else math.inf


def _shown(value: float) -> str:
    return f"{value:,}" if value < 10**18 else "more than 10^18"


def _too_large(model: str, what: str, *, most: str) -> ModelError:
    return ModelError(
        f"the config of {model} is too large to read: {what} and the most is {most}; correct its config.json, "
        "or take another model"
    )
