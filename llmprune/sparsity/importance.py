"""Importance of single weights: increase of the layer-wise squared error when a weight is pruned.

Shapes: O outputs of a matrix, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.linalg.cholesky import inverse

if TYPE_CHECKING:
    from torch import Tensor


def compensated_importance(weight_OI: Tensor, gram_II: Tensor, *, damping: float) -> Tensor:
    """Return w_i² / [(A + λ diag A)⁻¹]_ii: the error after all other weights of the output compensate.

    Source: optimal brain surgeon (Hassibi and Stork, NeurIPS 1992), on the inputs scaled to A's unit diagonal.
    """
    scale_I = gram_II.diagonal().clamp_min(1e-30).sqrt()
    inverse_II = inverse(gram_II / scale_I[:, None] / scale_I, damping, setting="sparsity.method.damping")
    return (weight_OI * scale_I).square_().div_(inverse_II.diagonal())


def importance_operations(inputs: int) -> float:
    """Return the float32 operations of the inverse."""
    return 1.0 * inputs**3
