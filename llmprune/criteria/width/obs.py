"""Optimal brain surgeon: Hassibi & Stork 1993, for whole neurons as in ZipLM (arXiv 2302.04089).

    score of neuron f = mean over tokens of ‖ x W^T − x̂ Ŵ^T ‖²   when f and all neurons removed before it are gone

Neurons are removed one by one, each time the one whose removal costs least after the weights of the others are solved
again to compensate for it; its score is the error reached. Scores therefore rise in the order of removal, and two
neurons with the same activation count as one. Key-value groups of attention heads are removed group by group. The
algebra is in ``accumulators/obs``.

The error assumes the compensation that the refit makes, with the same regularization towards the old weights.
Correlations that only a narrow calibration text has make neurons look replaceable that are not so elsewhere:
``shrinkage`` scales the correlations down; at 1 none is left, and the order is that of ``activation``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.common.linalg.gram import gram_operations
from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Obs(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: obs, ridge: 0.1, shrinkage: 0.5}}``."""

    cost_note: ClassVar[str | None] = (
        "solves a system for every neuron of a layer; its time grows with the cube of the width"
    )
    routed_refusal: ClassVar[str | None] = "it assumes the refit, and routed experts are not refit"
    assumes_refit: ClassVar[bool] = True
    is_additive: ClassVar[bool] = False

    kind: Literal["obs"] = "obs"
    ridge: float = Field(
        0.1,
        gt=0,
        description="Of `obs`: ridge of the compensation, towards the old weights, in units of the mean of diag(XᵀX).",
    )
    shrinkage: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Of `obs`: share of the correlations between neurons that is neglected; 1: all of them.",
    )

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        from llmprune.criteria.accumulators.obs import ObsAccumulator

        return ObsAccumulator(output_DF, self.ridge, shrinkage=self.shrinkage)

    def operations(self, width: int) -> int:
        """Return the float64 operations of the inverse and of all removals."""
        return 4 * width**3

    def token_operations(self, width: int, hidden: int) -> float:
        """Return the operations of XᵀX."""
        return gram_operations(width)

    def memory(self, width: int, sources: int = 1) -> int:
        """Return the bytes of each source's float32 sums and of four float64 matrices of the removals."""
        return width**2 * (4 * sources + 4 * 8)
