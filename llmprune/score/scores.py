"""What pass 1 found out: the importance of every layer, neuron, group of attention heads and expert.

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
    """``layers``: float32 [N] or None; by ``unit_key``: ``neurons`` float32 [F], of experts [E, F]; ``experts`` [E];
    ``heads``, of key-value groups, [G].

    ``routed``: how many tokens each expert got, float32 [E], of every unit with experts.
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
