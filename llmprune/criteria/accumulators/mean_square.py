"""What criteria by activations have in common: the mean square of each neuron's activation.

Shapes: B batch, L sequence length, T tokens, D hidden size, F neurons of a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.criteria.base import UnitAccumulator

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquare(UnitAccumulator):
    """Sums squares over tokens; ``per_neuron_F`` has what the criterion makes of the weights, float32."""

    def __init__(self, per_neuron_F: Tensor) -> None:
        self.per_neuron_F = per_neuron_F
        self.sum_F = per_neuron_F.new_zeros(per_neuron_F.shape)
        self.tokens = per_neuron_F.new_zeros(1)

    def sums(self) -> list[Tensor]:
        """Squares by neuron [F], and the tokens [1]."""
        return [self.sum_F, self.tokens]

    def update(self, values_BLF: Tensor) -> None:
        """Take in a batch of activations."""
        values_TF = values_BLF.flatten(0, -2).float()
        self.sum_F += values_TF.square().sum(0)
        self.tokens += values_TF.shape[0]

    def mean(self) -> Tensor:
        """Mean over tokens of the squares [F]; 0 before the first token."""
        return self.sum_F / self.tokens.clamp_min(1)
