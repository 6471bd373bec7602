"""Second moment of the activation × squared norm of the output weights.

    score of neuron f = mean over tokens of x_f² · ‖ column f of the output projection ‖²

It is the energy that the neuron adds to the residual stream, correlations between neurons neglected. The activation
half is Minitron's (arXiv 2407.14679); the weight half makes neurons of one layer comparable by what they write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.accumulators.mean_square import Energy
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Activation(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: activation}}``."""

    kind: Literal["activation"] = "activation"

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        return Energy(output_DF.float().square().sum(0))
