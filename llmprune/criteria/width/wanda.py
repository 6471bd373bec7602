"""Activation norm × weight magnitude: Wanda (arXiv 2306.11695), summed over outputs for whole neurons.

    score of neuron f = √(mean over tokens of x_f²) · Σ over outputs d of |w_df|

It is Wanda's importance of single weights, summed over the output column of a neuron as the baseline Wanda-sp of
FLAP's authors does (arXiv 2312.11983). In contrast to ``activation`` it uses the 1-norm of the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.accumulators.mean_square import MeanSquare
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: wanda}}``."""

    kind: Literal["wanda"] = "wanda"

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        return _NormTimesMagnitude(output_DF.float().abs().sum(0))


class _NormTimesMagnitude(MeanSquare):
    def scores(self) -> Tensor:
        return self.mean().sqrt() * self.weight_factor_F
