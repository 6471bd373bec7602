"""Activation norm × weight magnitude: Wanda (arXiv 2306.11695), summed over outputs for whole neurons.

    score of neuron f = √(mean over tokens of x_f²) · Σ over outputs d of |w_df|

Wanda's importance of single weights, added up over the output column of a neuron as
FLAP's authors do in their baseline Wanda-sp (arXiv 2312.11983). Against ``activation`` it
orders by the 1-norm of the column in place of the 2-norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.mean_square import MeanSquare
from llmprune.criteria.base import UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: wanda}}``."""

    kind: Literal["wanda"] = "wanda"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return _NormTimesMagnitude(output_DF.float().abs().sum(0))


class _NormTimesMagnitude(MeanSquare):
    def scores(self) -> Tensor:
        return self.mean().sqrt() * self.per_neuron_F
