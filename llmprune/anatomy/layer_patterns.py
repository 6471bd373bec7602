"""Find layer patterns: differences between layers that repeat every few layers, such as sliding and full attention.

They are found in the config's lists by layer and in the layers' modules, for any model family. Dense layers before the
mixtures, or a list without a period, are no pattern: a config states these layer by layer, or by a count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.config_edits import INDEX_LISTS, LAYER_LISTS, NUMBER_LISTS
from llmprune.anatomy.layer_equivalence import features, value_text
from llmprune.anatomy.meta_model import find_layers, text_config
from llmprune.anatomy.types import LayerPattern

_PERIOD_WORDS = (
    "pattern",
    "period",
    "interval",
    "step",
    "every",
    "interleave",
    "group_size",
)  # in names of period fields


def find_patterns(model: PreTrainedModel) -> tuple[LayerPattern, ...]:
    """Return the patterns of a model's layers, from the config's lists first; each partition of the layers once."""
    _, layers = find_layers(model)
    fields = text_config(model.config).to_dict()
    stated = {value for name, value in fields.items() if type(value) is int and _names_a_period(name)}
    found: dict[tuple[int, ...], LayerPattern] = {}
    for name, kinds in [*_listed(fields, len(layers)), *_built(layers)]:
        period = _period(kinds, stated)
        if period is not None:
            partition = tuple(kinds.index(kind) for kind in kinds)
            found.setdefault(partition, LayerPattern(name, period, tuple(kinds)))
    return tuple(found.values())


def first_like_each(model: PreTrainedModel) -> tuple[int, ...]:
    """Return for each layer the index of the first layer like it: itself, or one that differs in its index alone.

    Layers are alike with the same classes, sizes and plain attributes, and the same entries in the config's lists.
    """
    _, layers = find_layers(model)
    listed = [kinds for _, kinds in _listed(text_config(model.config).to_dict(), len(layers))]
    kinds = [(_attributes(layer), [kind[index] for kind in listed]) for index, layer in enumerate(layers)]
    return tuple(kinds.index(kind) for kind in kinds)


def _names_a_period(name: str) -> bool:
    return any(word in name for word in _PERIOD_WORDS)


def _period(kinds: Sequence[str], stated: set[int]) -> int | None:
    """Return the period of the kinds, in layers; None where they are all equal or do not repeat.

    ``stated``: periods in the config's fields, with which fewer than two periods of layers are a pattern.
    """
    for period in range(1, len(kinds)):
        if all(kind == kinds[index] for index, kind in enumerate(kinds[period:])):
            repeats = 2 * period <= len(kinds) or period in stated
            return period if period > 1 and repeats else None
    return None


def _listed(fields: dict[str, Any], count: int) -> Iterator[tuple[str, list[str]]]:
    for name in LAYER_LISTS:
        value = fields.get(name)
        if isinstance(value, list | tuple) and len(value) == count:
            yield name, [str(one) for one in value]
    for names, first in ((INDEX_LISTS, 0), (NUMBER_LISTS, 1)):
        for name in names:
            value = fields.get(name)
            if isinstance(value, list | tuple):
                yield name, ["listed" if index + first in value else "not listed" for index in range(count)]


def _built(layers: nn.ModuleList) -> Iterator[tuple[str, list[str]]]:
    """Yield every class, size and plain attribute of the layers' modules, by layer."""
    seen = [_attributes(layer) for layer in layers]
    for name in dict.fromkeys(name for one in seen for name in one):
        yield name, [one.get(name, "absent") for one in seen]


def _attributes(layer: nn.Module) -> dict[str, str]:
    return {name: value_text(value) for name, value in features(layer).items() if not isinstance(value, Tensor)}
