"""What pass 1 found out: the importance of every layer and of every neuron.

Shapes: N layers of the dense model, F neurons of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_LAYERS = "layers"


@dataclass(frozen=True)
class Scores:
    """``layers``: float32 [N] or None; ``neurons``: float32 [F] by ``unit_key``."""

    layers: Tensor | None
    neurons: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {f"neurons.{key}": scores_F.contiguous() for key, scores_F in self.neurons.items()}
        if self.layers is not None:
            tensors[_LAYERS] = self.layers
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what ``save`` wrote."""
        tensors = load_file(path)
        layers_N = tensors.pop(_LAYERS, None)
        return cls(layers_N, {key.removeprefix("neurons."): value for key, value in tensors.items()})


def unit_key(layer: int, unit_path: str) -> str:
    """Name of one layer's unit: ``12.mlp``; ``12`` where the neurons lie in the layer itself."""
    return f"{layer}.{unit_path}" if unit_path else str(layer)
