"""The recipe's ``refit`` section: settings of the repair of a cut, by ridge regressions and by training layers.

``common.linalg.cross_validated_ridge`` has the formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmprune.common.schema import Section

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.common.linalg.cross_validated_ridge import NormalEquations
    from llmprune.common.linalg.cut_equations import CutEquations


MOST_FOLDS = 4  # each needs memory for a Gram matrix
PASSES_OF_EXPERTS = 8  # over the routed experts of a layer, some in each; four retained as much, and need more memory
EPOCHS = 4  # passes over the training windows of ``block``, at most
WINDOWS_OF_STEP = 4  # of ``block``, in all processes together


class Refit(Section):
    """Settings of the refit, such as ``refit: {ridge: 0.1, up: true, block: true}``.

    Without ``ridge``, cross-validation chooses it for each projection. In either case a projection keeps its sliced
    weights where the refit does not help on held-out calibration windows.
    """

    ridge: float | None = Field(
        None,
        ge=0,
        description="Strength of the pull towards the sliced weights, in units of the mean of diag(XᵀX); default: "
        "chosen for each projection on held-out calibration windows.",
    )

    up: bool = Field(
        False,
        description="Also refit the up projections of gated MLPs that lose neurons: more quality is retained, at the "
        "cost of about 5 more forward passes over the calibration tokens.",
    )

    block: bool = Field(
        False,
        description="After these solves, train all weights of each layer towards the dense hidden states, on the "
        "hidden states that it gets in the pruned model, at the cost of about 12 more forward passes over the "
        "calibration tokens.",
    )

    def folds(self, sources: int) -> int:
        """Return the number of calibration folds whose sums are held at once."""
        return min(max(sources, 2), MOST_FOLDS)

    def make_equations(self, folds: int, *, one_source: bool = False) -> NormalEquations:
        """Return empty normal equations of one projection, over windows in ``folds`` calibration folds.

        ``one_source``: the folds are parts of a single source.
        """
        from llmprune.common.linalg.cross_validated_ridge import NormalEquations

        return NormalEquations(self.ridge, folds, one_source=one_source)

    def make_cut_equations(self, folds: int, *, removed_RD: Tensor, one_source: bool = False) -> CutEquations:
        """Return empty normal equations of a projection from which the rows [R, D] of its transposed weight are cut."""
        from llmprune.common.linalg.cut_equations import CutEquations

        return CutEquations(self.ridge, folds, removed_RD=removed_RD, one_source=one_source)
