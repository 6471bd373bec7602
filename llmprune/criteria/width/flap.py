"""Fluctuation: FLAP, arXiv 2312.11983 (its metric WIFV).

    score of neuron f = variance over tokens of x_f · ‖ column f of the output projection ‖²

A neuron with a small variance writes almost a constant, which the remaining neurons can replace. FLAP adds the lost
constant to a bias; here the refit restores it, as far as the remaining neurons can.

Squares are taken about each batch's own mean and combined in float64: a large mean with a small variance leaves the
variance exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.common.linalg.precision import in_float64
from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Flap(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: flap}}``."""

    kind: Literal["flap"] = "flap"

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        return _Fluctuation(output_DF.float().square().sum(0))


class _Fluctuation(UnitAccumulator):
    def __init__(self, column_energy_F: Tensor) -> None:
        self.column_energy_F = column_energy_F
        self.sum_F, self.square_F = in_float64(column_energy_F).new_zeros(2, len(column_energy_F))
        self.tokens = self.sum_F.new_zeros(1)

    def reducible_state(self) -> list[Tensor]:
        return [self.sum_F, self.square_F, self.tokens]

    def update(self, values_BLF: Tensor) -> None:
        import torch

        values_TF = values_BLF.flatten(0, -2).float()
        if not len(values_TF):
            return
        variance_F, mean_F = (in_float64(part) for part in torch.var_mean(values_TF, dim=0, correction=0))
        self.sum_F += mean_F * len(values_TF)
        self.square_F += (variance_F + mean_F.square()) * len(values_TF)
        self.tokens += len(values_TF)

    def scores(self) -> Tensor:
        tokens = self.tokens.clamp_min(1)
        variance_F = self.square_F / tokens - (self.sum_F / tokens).square()
        scores_F: Tensor = variance_F.clamp_min(0).float().to(self.column_energy_F.device) * self.column_energy_F
        return scores_F
