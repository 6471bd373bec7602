"""Optimal brain surgeon: Hassibi & Stork 1993, for whole neurons as in ZipLM (arXiv 2302.04089).

    score of neuron f = mean over tokens of ‖ x W^T − x̂ Ŵ^T ‖²   when f and all that went before it are gone

Neurons go one by one, always the one whose loss costs least once the weights of those that
stay are solved again to make up for it; a score is the error that is reached with it. So
scores rise in the order of removal, and two neurons that do the same count as one. Key-value groups of attention
heads go group by group.
``surgeon`` has the algebra.

The error assumes the compensation that the refit makes, with the same pull towards the old weights. What the
calibration text does not show, the solve does not see: correlations of a narrow text make
neurons look replaceable that are not elsewhere. ``shrinkage`` scales them down; at 1 none is left
and the order is that of ``activation``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.criteria.base import UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Obs(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: obs, ridge: 0.1, shrinkage: 0.5}}``."""

    cost: ClassVar[str | None] = "solves for every neuron of a layer, time by the cube of the width"
    routed_refusal: ClassVar[str | None] = "it assumes the refit, and routed experts are cut without"
    assumes_refit: ClassVar[bool] = True
    adds_up: ClassVar[bool] = False

    kind: Literal["obs"] = "obs"
    ridge: float = Field(
        0.1,
        gt=0,
        description="Of `obs`: pull of the compensation towards the old weights, in units of the mean of diag(XᵀX).",
    )
    shrinkage: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Of `obs`: how much of the correlations between neurons is left aside; 1: all of them.",
    )

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        from llmprune.criteria.accumulators.obs import Surgeon

        return Surgeon(output_DF, self.ridge, shrinkage=self.shrinkage)

    def operations(self, width: int) -> int:
        """The inverse, and the removals."""
        return 4 * width**3

    def memory(self, width: int) -> int:
        """The float32 sums, and four matrices of float64 while they are worked on."""
        return width**2 * (4 + 4 * 8)
