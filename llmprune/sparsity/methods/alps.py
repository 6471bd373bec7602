"""ADMM on the layer-wise problem, after ALPS (Meng et al., arXiv 2406.07831): the mask depends on all inputs at once.

    minimise over W, D   tr((W − W₀) A (W − W₀)ᵀ)   with W = D, D of the pattern

with A = XᵀX scaled to a unit diagonal, + λI.

SparseGPT prunes an input knowing only that later inputs can compensate. Here W moves towards weights of the pattern
while its outputs stay close to those of W₀, and the mask is chosen anew in every step:

    W ← W₀ + ρ(D − U − W₀)(A + ρI)⁻¹        D ← the largest of W + U        U ← W + U − D

ALPS raises ρ gradually and needs an eigendecomposition. A few steps with one ρ, and so with one inverse, stay less
close to W₀ on the calibration text but retain more of the model's quality, on that text and more so on others. The
result is the last D.

Shapes: O outputs of a matrix, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.common.linalg.cholesky import inverse
from llmprune.sparsity.method import CompensatingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern

_PENALTY = 0.5  # ρ, in units of the scaled diagonal of A
_STEPS = 5


class Alps(CompensatingMethod):
    """``method: {kind: alps}``."""

    kind: Literal["alps"] = "alps"

    def prune(self, weight_OI: Tensor, moments: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Alternate between the least-squares weights and their projection onto the pattern."""
        import torch

        assert moments is not None, "required"
        scale_I = moments.diagonal().clamp_min(1e-30).sqrt()
        gram_II = moments / scale_I[:, None] / scale_I
        dense_OI = weight_OI * scale_I
        mask_OI = pattern.mask(dense_OI.abs())
        sparse_OI = dense_OI * mask_OI
        dual_OI = torch.zeros_like(dense_OI)
        step_II = inverse(gram_II, self.damping + _PENALTY, setting="sparsity.method.damping").mul_(_PENALTY)
        for _ in range(_STEPS):
            shifted_OI = torch.addmm(dense_OI + dual_OI, (sparse_OI - dual_OI).sub_(dense_OI), step_II)
            mask_OI = pattern.mask(shifted_OI.abs())
            sparse_OI = shifted_OI * mask_OI
            dual_OI = shifted_OI.sub_(sparse_OI)
        return sparse_OI / scale_I, mask_OI

    def operations(self, outputs: int, inputs: int) -> float:
        """Return the operations of the inverse and of one product in each step."""
        return inputs**3 + 2.0 * _STEPS * outputs * inputs**2
