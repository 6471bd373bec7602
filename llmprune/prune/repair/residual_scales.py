"""Factors by which projections' outputs are added to the residual stream, measured once in a run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from llmprune.common.distributed import broadcast_from_first
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hooks import zero_output
from llmprune.layerwise.residual_scale import residual_scale


class ResidualScales:
    """Residual scales by class of layer and projection; None where a norm follows the projection.

    ``known``: those already measured. It is saved with the snapshots, so that a continued run computes with the same
    numbers.
    """

    def __init__(self, known: dict[str, float | None]) -> None:
        self.known = dict(known)

    def of(self, layer: nn.Module, name: str) -> float | None:
        """Return the scale of a projection; None if it is not measured yet, or has none."""
        return self.known.get(_key(layer, name, zeroed=()))

    def measure(
        self, forward: LayerwiseForward, index: int, *, layer: nn.Module, name: str, zeroed: Sequence[str] = ()
    ) -> float | None:
        """Return the scale of a projection in a layer with its weights; measure it in the first layer of a class.

        ``zeroed``: modules whose output is zero meanwhile.
        """
        key = _key(layer, name, zeroed=zeroed)
        if key not in self.known:
            with zero_output([layer.get_submodule(path) for path in zeroed]):
                scale = residual_scale(forward, index, layer=layer, output=layer.get_submodule(name))
            self.known[key] = broadcast_from_first(scale)
        return self.known[key]


def _key(layer: nn.Module, name: str, *, zeroed: Sequence[str]) -> str:
    return f"{type(layer).__name__}.{name}" + (f" without {','.join(zeroed)}" if zeroed else "")
