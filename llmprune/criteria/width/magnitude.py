"""Weight magnitude: Han et al. (arXiv 1506.02626), over all weights that a neuron owns.

    score of neuron f = ‖ every weight and bias of f: its rows of the inputs, its column of the output ‖₂

coupled as LLM-Pruner (arXiv 2305.11627) groups them. It needs no text, and what a
neuron does with text does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.base import UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: magnitude}}``."""

    kind: Literal["magnitude"] = "magnitude"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """The norms of one unit with these weights."""
        total_F = output_DF.float().square().sum(0)
        for rows in inputs:
            total_F += rows.float().reshape(len(rows), -1).square().sum(1)
        return _Norms(total_F.sqrt())


class _Norms(UnitAccumulator):
    def __init__(self, norm_F: Tensor) -> None:
        self.norm_F = norm_F

    def sums(self) -> list[Tensor]:
        return []

    def update(self, values_BLF: Tensor) -> None:
        """Nothing to take in: the weights say it all."""

    def scores(self) -> Tensor:
        return self.norm_F
