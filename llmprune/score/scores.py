"""Importance scores of layers, neurons, key-value groups of attention heads and experts.

Shapes: N layers of the dense model, F neurons of a unit, G key-value groups, E experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.criteria.combine import Combine, combine_scores

_LAYERS = "layers"
_OF = ":"  # between the number of a source and the name of its scores
_NOTES = "notes"
_KINDS = ("neurons", "experts", "routed", "heads", "hidden", "distances", "usage")


@dataclass(frozen=True)
class Scores:
    """Scores of a dense model, float32; the others than ``layers`` are mappings by ``unit_key``.

    ``layers``: [N], or None where layers are not scored. ``neurons``: [F], of routed experts [E, F]. ``experts``: [E].
    ``routed``: number of tokens routed to each expert [E], of units of routed experts. ``heads``: [G]. ``hidden``:
    what each layer reads of every residual channel [D], by the layer's key. ``distances``: between the experts of a
    layer [E, E], and their ``usage`` [E], where experts are merged.
    ``by_source``: the scores by each source of text alone, where the others are combined from them; empty where sources
    are not told apart. ``notes``: what a report says about them.
    """

    layers: Tensor | None
    neurons: dict[str, Tensor]
    experts: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    distances: dict[str, Tensor] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)
    by_source: tuple[Scores, ...] = ()
    notes: tuple[str, ...] = ()
    hidden: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = self._tensors()
        for source, scores in enumerate(self.by_source):
            tensors |= {f"{source}{_OF}{name}": value.clone() for name, value in scores._tensors().items()}
        save_file(tensors, path, metadata={_NOTES: json.dumps(self.notes)})

    def _tensors(self) -> dict[str, Tensor]:
        """Return the scores by all text, by the names that they have in a file."""
        tensors = {} if self.layers is None else {_LAYERS: self.layers}
        for kind in _KINDS:
            tensors |= {f"{kind}.{key}": value.contiguous() for key, value in getattr(self, kind).items()}
        return tensors

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what ``save`` wrote."""
        together: dict[str, Tensor] = {}
        by_source: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(path).items():
            source, _, own = name.rpartition(_OF)
            (by_source.setdefault(int(source), {}) if source else together)[own] = value
        of_sources = tuple(cls._of(by_source[source]) for source in sorted(by_source))
        with safe_open(path, framework="pt") as file:
            notes = tuple(json.loads(file.metadata()[_NOTES]))
        return replace(cls._of(together), by_source=of_sources, notes=notes)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor]) -> Scores:
        """Return the scores from the tensors of ``_tensors``."""
        layers_N = tensors.pop(_LAYERS, None)
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for name, value in tensors.items():
            kind, _, key = name.partition(".")
            kinds[kind][key] = value
        scores = cls(layers_N, {})
        for kind, found in kinds.items():
            getattr(scores, kind).update(found)
        return scores


def combine_sources(by_source: Sequence[Scores], rule: Combine) -> Scores:
    """Return the scores that several sources give together, without those of layers; a single source's are returned."""
    if len(by_source) == 1:
        return by_source[0]
    first = by_source[0]
    neurons, experts, heads, hidden = (
        {key: combine_scores([getattr(one, kind)[key] for one in by_source], rule) for key in getattr(first, kind)}
        for kind in ("neurons", "experts", "heads", "hidden")
    )
    routed = {key: sum((one.routed[key] for one in by_source[1:]), start) for key, start in first.routed.items()}
    combined = replace(first, layers=None, neurons=neurons, experts=experts, routed=routed, by_source=tuple(by_source))
    return replace(combined, heads=heads, hidden=hidden)
