"""Importance scores of layers, neurons, key-value groups of attention heads and experts.

Shapes: N layers of the dense model, F neurons of a unit, G key-value groups, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_LAYERS = "layers"
_KINDS = ("neurons", "experts", "routed", "heads")


@dataclass(frozen=True)
class Scores:
    """Scores of a dense model, float32; the others than ``layers`` are mappings by ``unit_key``.

    ``layers``: [N], or None where layers are not scored. ``neurons``: [F], of routed experts [E, F]. ``experts``: [E].
    ``routed``: number of tokens routed to each expert [E], of units of routed experts. ``heads``: [G].
    """

    layers: Tensor | None
    neurons: dict[str, Tensor]
    experts: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {} if self.layers is None else {_LAYERS: self.layers}
        for kind in _KINDS:
            tensors |= {f"{kind}.{key}": value.contiguous() for key, value in getattr(self, kind).items()}
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what ``save`` wrote."""
        tensors = load_file(path)
        layers_N = tensors.pop(_LAYERS, None)
        kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for name, value in tensors.items():
            kind, _, key = name.partition(".")
            kinds[kind][key] = value
        return cls(layers_N, **kinds)
