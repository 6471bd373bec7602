"""The largest config that is looked at: refused from the raw JSON, before transformers makes anything of it.

A config decides how many modules, list entries and real buffers are built, and it comes from whoever owns the
repository. The limits leave room for several times the largest published models; nothing beyond them can be planned
in a sensible time anyway. Memory below them is limited where a process runs for others (service/planner.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmprune.common.errors import ModelError
from llmprune.common.schema import format_size

MOST_BYTES = 8 * 10**6  # a config that lists every quantized expert has about 5 MB
MOST_ENTRIES = 65_536  # of a list: settings by layer, labels, modules; transformers checks them one by one
MOST_NESTED = 32  # configs of several modalities have 6
_COUNTS = (  # the first pattern that a key matches says the most of its numbers
    (re.compile(r"(?<!per_)layers?$|(?<!per_)blocks?$|depths?$|stages?$|cycles$"), 1_024),  # Llama 3.1 405B has 126
    (re.compile(r"experts?$|heads?$|labels$"), 65_536),  # Doge has 16,384 experts, mgp-str 50,257 labels
    (re.compile(r"vocab"), 2**26),  # n-gram vocabularies have 20 million
)
# The words by which transformers' config classes name what sizes a layer, a buffer or a list. Other numbers have no
# limit: token ids, lengths, and whatever people write down beside the model.
_SIZE = re.compile(
    r"(?:^|_)(?:num|n|d|hc)_|_num(?:ber)?$|size|dim|width|channel|chans|planes|resolution|shape|rank|inner|embd|embed|emb_"
    r"|groups?(?:_|$)|ffn|(?:^|_)d?ff|conv_|kernel|stride|dilat|rates$|kpool|cca_time|temporal|levels$|units|features|bins$"
    r"|buckets|codebook|types$|mult|factor|ratios?$|expan[ds]|divisor|reduction|repeats$|times$|average|ngram|blocks_"
    r"|dense_replace|idx$|indices$|indexes$"
)
_NO_SIZE = re.compile(  # of the keys with such a word: lengths of text, and statistics of the training
    r"positions?(?:_embeddings?)?$|length$|ctx$|window_size|chunk_?size|base$|(?:^|_)total_|^(?:num|n)_tokens$|^model_size$"
    r"|(?:^|_)(?:params?|parameters|train(?:ed|ing)?|seen|steps|samples|examples|documents|sequences|epochs|updates"
    r"|iterations|flops|bytes|file|dataset|corpus|batch|shard|download)(?:_|$)"
)
_MOST_SIZE = 2**24  # 16.8 million
_CLIPPED = 100  # characters of a key that are looked at and shown


def check_config_file(path: Path, model: str) -> None:
    """Raise ModelError where a model's ``config.json`` describes more than is looked at; where there is none, pass."""
    if not path.is_file():
        return
    if path.stat().st_size > MOST_BYTES:
        raise _too_large(model, f"it has {format_size(path.stat().st_size)}", most=format_size(MOST_BYTES))
    try:
        config = json.loads(path.read_bytes())
    except RecursionError:
        raise _too_large(model, "it is nested hundreds deep", most=f"{MOST_NESTED} levels") from None
    except ValueError:
        return  # transformers says what is wrong with it
    check_config(config, model)


def check_config(config: Any, model: str) -> None:
    """Raise ModelError where a config, as read from JSON, describes more than is looked at, or names another file."""
    if isinstance(config, dict) and "configuration_files" in config:
        raise ModelError(
            f"the config of {model} names other files to be read in its place (configuration_files); "
            "take a checkpoint whose config.json is whole"
        )
    for where, key, value, depth in _values(config):
        place = where or "it"
        if depth > MOST_NESTED:
            raise _too_large(model, f"{place} is nested deeper", most=f"{MOST_NESTED} levels")
        if isinstance(value, list) and len(value) > MOST_ENTRIES:
            raise _too_large(model, f"{place} has {len(value):,} entries", most=f"{MOST_ENTRIES:,}")
        if isinstance(value, int | float) and value > (most := _most(key, isinstance(value, int))):
            raise _too_large(model, f"{place} is {_shown(value)}", most=f"{most:,}")


def _values(config: Any) -> Iterator[tuple[str, str, Any, int]]:
    """Every value with its place, the key that it belongs to, and how deep it lies; without recursion."""
    pending: list[tuple[str, str, Any, int]] = [("", "", config, 0)]
    while pending:
        place, key, value, depth = pending.pop()
        yield place, key, value, depth
        if isinstance(value, dict):
            for name, inner in value.items():
                pending.append(
                    (f"{place}.{name[:_CLIPPED]}".lstrip(".")[-_CLIPPED:], name[-_CLIPPED:], inner, depth + 1)
                )
        elif isinstance(value, list):
            pending += [(place, key, inner, depth + 1) for inner in value]


def _most(key: str, whole: bool) -> float:
    """The most of a number under a key: without end where it sizes nothing, and of fractions only counts have one."""
    counted = next((most for pattern, most in _COUNTS if pattern.search(key)), None)
    if counted is not None:
        return counted
    return _MOST_SIZE if whole and _SIZE.search(key) and not _NO_SIZE.search(key) else math.inf


def _shown(value: float) -> str:
    return f"{value:,}" if value < 10**18 else "more than 10^18"


def _too_large(model: str, what: str, *, most: str) -> ModelError:
    return ModelError(
        f"the config of {model} is too large to look at: {what} and the most is {most}; correct its config.json, "
        "or take another model"
    )
