"""Mean squares of the activations of neurons, which several width criteria are made of.

Shapes: B batch, L sequence length, T tokens, F neurons of a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.criteria.accumulators.base import UnitAccumulator

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquare(UnitAccumulator):
    """Sums of squares over tokens; ``weight_factor_F`` is the factor of the score that the weights give, float32."""

    def __init__(self, weight_factor_F: Tensor) -> None:
        self.weight_factor_F = weight_factor_F
        self.sum_F = weight_factor_F.new_zeros(weight_factor_F.shape)
        self.tokens = weight_factor_F.new_zeros(1)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of squares [F] and the number of tokens [1]."""
        return [self.sum_F, self.tokens]

    def update(self, values_BLF: Tensor) -> None:
        """Add a batch of activations."""
        values_TF = values_BLF.flatten(0, -2).float()
        self.sum_F += values_TF.square().sum(0)
        self.tokens += values_TF.shape[0]

    def mean(self) -> Tensor:
        """Return the mean square of each activation [F]; 0 before the first token."""
        return self.sum_F / self.tokens.clamp_min(1)


class Energy(MeanSquare):
    """Mean squares times the factor of the weights."""

    def scores(self) -> Tensor:
        """Return the energy of each neuron [F]."""
        return self.mean() * self.weight_factor_F
