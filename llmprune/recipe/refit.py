"""Whether and how the cut is repaired; ``normal_equations`` has the formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmprune.common.schema import Section

if TYPE_CHECKING:
    from llmprune.common.linalg.cross_validated_ridge import NormalEquations


MOST_FOLDS = 4  # each takes a Gram matrix of memory


class Refit(Section):
    """``refit: {ridge: 0.1, up: true}``; without ``ridge`` each projection gets what cross-validation finds.

    Either way a projection stays as it was sliced where the repair does not help on text that the solve did not see.
    """

    ridge: float | None = Field(
        None,
        ge=0,
        description="Pull towards the sliced weights, in units of the mean of diag(XᵀX); default: chosen for each "
        "projection on calibration text that the solve did not see.",
    )

    up: bool = Field(
        False,
        description="Also solve the up projections of gated MLPs that lose neurons again: keeps more, and takes "
        "about 5 forward passes over the calibration tokens longer.",
    )

    def folds(self, sources: int) -> int:
        """How many folds of the calibration the sums are kept of, one beside the other."""
        return min(max(sources, 2), MOST_FOLDS)

    def open(self, folds: int) -> NormalEquations:
        """Start the sums of one projection over windows in so many folds."""
        from llmprune.common.linalg.cross_validated_ridge import NormalEquations

        return NormalEquations(self.ridge, folds)
