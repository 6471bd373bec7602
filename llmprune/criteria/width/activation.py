"""Activation second moment × output weight norm.

    score of neuron f = mean over tokens of x_f² · ‖ column f of the output projection ‖²

the energy that the neuron adds to the residual stream, correlations between
neurons left aside. The activation half is Minitron's (arXiv 2407.14679), the
weight half makes neurons of one layer comparable in what they write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.mean_square import MeanSquare
from llmprune.criteria.base import UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Activation(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: activation}}``."""

    kind: Literal["activation"] = "activation"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return _Energy(output_DF.float().square().sum(0))


class _Energy(MeanSquare):
    def scores(self) -> Tensor:
        return self.mean() * self.per_neuron_F
