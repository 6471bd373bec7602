"""First-order Taylor with every token alike: our own.

    score of neuron f = mean over tokens of | x_f · ∂loss/∂x_f | / ‖ ∂loss/∂h ‖

x_f is the neuron's activation, h the hidden states after the layer. As ``taylor`` by tokens it asks what each neuron
does to the loss, but tokens that the model finds hard, whose gradients are long, say no more than the others: what is
hard is another thing in each kind of text. For text unlike the calibration's it keeps more than criteria that look at
what neurons write and not at what becomes of it; for text like it those keep more (eval/benchmarks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from llmprune.criteria.base import Sees, UnitAccumulator, WidthCriterion
from llmprune.criteria.taylor import Taylor

if TYPE_CHECKING:
    from torch import Tensor


class TaylorShare(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: taylor_share}}``."""

    takes: ClassVar[Sees] = "relative effects"
    cost: ClassVar[str | None] = Taylor.cost
    routed_refusal: ClassVar[str | None] = Taylor.routed_refusal

    kind: Literal["taylor_share"] = "taylor_share"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return Taylor(absolute="token").open(output_DF)
