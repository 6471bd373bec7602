"""Weight magnitude × norm of its input (Wanda, Sun et al., arXiv 2306.11695).

    score of weight w_oi = |w_oi| · √(Σ over tokens of x_i²)

Scores are compared within a group, or within the weights of one output. Kept weights do not change unless ``refit`` is
on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmprune.sparsity.method import InputMoments, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern


class Wanda(SparsityMethod):
    """``method: {kind: wanda}``."""

    requires: ClassVar[InputMoments] = "squares"
    refits_by_default: ClassVar[bool] = False

    kind: Literal["wanda"] = "wanda"

    def prune(self, weight_OI: Tensor, moments: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Keep the weights of each group with the largest contributions."""
        mask_OI = pattern.mask(weight_OI.abs() * _squares(moments).sqrt())
        return weight_OI * mask_OI, mask_OI

    def importance(self, weight_OI: Tensor, moments: Tensor | None) -> Tensor:
        """Return the square of the score."""
        return weight_OI.square() * _squares(moments)


def _squares(moments: Tensor | None) -> Tensor:
    """Return Σ x² of each input [I]."""
    assert moments is not None, "required"
    return moments.diagonal() if moments.ndim == 2 else moments
