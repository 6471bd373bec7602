"""Weight magnitude × norm of its input (Wanda, Sun et al., arXiv 2306.11695).

    score of weight w_oi = |w_oi| · √(Σ over tokens of x_i²)

Scores are compared within a group, or within the weights of one output. What stays keeps
its values, unless ``refit`` is on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmprune.sparsity.method import Needs, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern


class Wanda(SparsityMethod):
    """``method: {kind: wanda}``."""

    needs: ClassVar[Needs] = "squares"
    refits_by_default: ClassVar[bool] = False

    kind: Literal["wanda"] = "wanda"

    def prune(self, weight_OI: Tensor, sums: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Keep those of each group that write most."""
        assert sums is not None, "it reads the inputs' squares"
        squares_I = sums.diagonal() if sums.ndim == 2 else sums
        mask_OI = pattern.mask(weight_OI.abs() * squares_I.sqrt())
        return weight_OI * mask_OI, mask_OI
