"""The geometric mean of ``share`` and of first-order Taylor by tokens.

    score of neuron f = √( share_f · mean over tokens of | x_f · ∂loss/∂x_f | )

The one sees what a neuron writes and not what becomes of it, the other how the loss hangs on it and not how much can go
before that holds no more. Either errs where the other does not: neurons chosen by both keep more of text of other
kinds than the calibration's (eval/benchmarks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from llmprune.criteria.base import Sees, UnitAccumulator, WidthCriterion
from llmprune.criteria.share import Share
from llmprune.criteria.taylor import Taylor

if TYPE_CHECKING:
    from torch import Tensor


class ShareTaylor(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: share_taylor}}``."""

    takes: ClassVar[Sees] = "both"
    cost: ClassVar[str | None] = Taylor.cost
    routed_refusal: ClassVar[str | None] = Taylor.routed_refusal

    kind: Literal["share_taylor"] = "share_taylor"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return _Both(Share().open(output_DF), Taylor(absolute="token").open(output_DF))


class _Both(UnitAccumulator):
    def __init__(self, share: UnitAccumulator, taylor: UnitAccumulator) -> None:
        self.share, self.taylor = share, taylor

    def sums(self) -> list[Tensor]:
        return [*self.share.sums(), *self.taylor.sums()]

    def update(self, values_BLF: Tensor) -> None:
        self.taylor.update(values_BLF)

    def update_with(self, values_BLF: Tensor, written_BLD: Tensor) -> None:
        self.share.update_with(values_BLF, written_BLD)

    def scores(self) -> Tensor:
        return self.share.scores().sqrt() * self.taylor.scores().sqrt()
