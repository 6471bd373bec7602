"""Activation second moment × output weight norm.

    score of neuron f = mean over tokens of x_f² · ‖ column f of the output projection ‖²

the energy that the neuron adds to the residual stream, correlations between
neurons left aside. The activation half is Minitron's (arXiv 2407.14679), the
weight half makes neurons of one layer comparable in what they write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.base import UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Activation(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: activation}}``."""

    kind: Literal["activation"] = "activation"

    def open(self, weight_DF: Tensor) -> UnitAccumulator:
        """Start the sums of one unit whose output projection has this weight."""
        return _SecondMoment(weight_DF)


class _SecondMoment(UnitAccumulator):
    def __init__(self, weight_DF: Tensor) -> None:
        self.column_energy_F = weight_DF.float().square().sum(0)
        self.sum_F = self.column_energy_F.new_zeros(self.column_energy_F.shape)
        self.tokens = self.sum_F.new_zeros(1)

    def sums(self) -> list[Tensor]:
        return [self.sum_F, self.tokens]

    def update(self, activation_BLF: Tensor) -> None:
        activation_TF = activation_BLF.flatten(0, -2).float()
        self.sum_F += activation_TF.square().sum(0)
        self.tokens += activation_TF.shape[0]

    def scores(self) -> Tensor:
        return self.sum_F / self.tokens.clamp_min(1) * self.column_energy_F
