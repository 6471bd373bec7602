"""Weight magnitude: Han et al. (arXiv 1506.02626), over all weights that a neuron owns.

    score of neuron f = ‖ all weights and biases of f: its rows of the inputs, its column of the output ‖₂

Weights are coupled as in LLM-Pruner (arXiv 2305.11627). The criterion reads no text, so it ignores the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: magnitude}}``."""

    kind: Literal["magnitude"] = "magnitude"

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the norms of the neurons of one unit with these weights."""
        total_F = output_DF.float().square().sum(0)
        for rows in inputs:
            total_F += rows.float().reshape(len(rows), -1).square().sum(1)
        return _Norms(total_F.sqrt())


class _Norms(UnitAccumulator):
    def __init__(self, norm_F: Tensor) -> None:
        self.norm_F = norm_F

    def reducible_state(self) -> list[Tensor]:
        return []

    def update(self, values_BLF: Tensor) -> None:
        """Ignore the activations: the score depends on the weights alone."""

    def scores(self) -> Tensor:
        return self.norm_F
