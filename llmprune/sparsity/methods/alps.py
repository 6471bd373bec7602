"""ADMM on the layer-wise problem, after ALPS (Meng et al., arXiv 2406.07831): masks that see all inputs at once.

    minimise over W, D   tr((W − W₀) A (W − W₀)ᵀ)   with W = D, D of the pattern

with A = XᵀX scaled to a unit diagonal, + λI.

SparseGPT decides about an input knowing only what later ones can repair; here W moves towards weights that have the
pattern while it keeps writing what W₀ writes, and which weights those are is decided anew in every step:

    W ← W₀ + ρ(D − U − W₀)(A + ρI)⁻¹        D ← the largest of W + U        U ← W + U − D

ALPS raises ρ bit by bit and pays for an eigendecomposition. Few steps with one ρ, and so with one inverse, do not come
as close to W₀ on the calibration text, and keep more of the model: on its text and more so on others. The weights are
left where the last D is.

Shapes: O outputs of a matrix, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.common.linalg.cholesky import inverse
from llmprune.sparsity.method import DAMPING, Needs, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern

_PENALTY = 0.5  # ρ
_STEPS = 5


class Alps(SparsityMethod):
    """``method: {kind: alps}``."""

    needs: ClassVar[Needs] = "gram"

    kind: Literal["alps"] = "alps"
    damping: float = Field(0.01, gt=0, description=DAMPING)

    def prune(self, weight_OI: Tensor, sums: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Let weights and pattern agree."""
        import torch

        assert sums is not None, "it reads the inputs' Gram matrix"
        scale_I = sums.diagonal().clamp_min(1e-30).sqrt()
        gram_II = sums / scale_I[:, None] / scale_I
        dense_OI = weight_OI * scale_I
        mask_OI = pattern.mask(dense_OI.abs())
        sparse_OI = dense_OI * mask_OI
        rest_OI = torch.zeros_like(dense_OI)
        pull_II = inverse(gram_II, self.damping + _PENALTY).mul_(_PENALTY)
        for _ in range(_STEPS):
            moved_OI = torch.addmm(dense_OI + rest_OI, (sparse_OI - rest_OI).sub_(dense_OI), pull_II)
            mask_OI = pattern.mask(moved_OI.abs())
            sparse_OI = moved_OI * mask_OI
            rest_OI = moved_OI.sub_(sparse_OI)
        return sparse_OI / scale_I, mask_OI
