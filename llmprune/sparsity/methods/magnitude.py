"""Largest weights (Han et al., "Learning both weights and connections", arXiv 1506.02626).

    score of weight w = |w|

The method reads no calibration text and damages language models badly: some inputs are a thousand times larger than
others. It serves as a baseline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmprune.sparsity.method import InputMoments, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern


class Magnitude(SparsityMethod):
    """``method: {kind: magnitude}``."""

    requires: ClassVar[InputMoments] = "nothing"
    refits_by_default: ClassVar[bool] = False

    kind: Literal["magnitude"] = "magnitude"

    def prune(self, weight_OI: Tensor, moments: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Keep the largest weights of each group."""
        mask_OI = pattern.mask(weight_OI.abs())
        return weight_OI * mask_OI, mask_OI

    def importance(self, weight_OI: Tensor, moments: Tensor | None) -> Tensor:
        """Return the square of the score."""
        return weight_OI.square()
