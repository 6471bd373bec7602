"""Inverses of Gram matrices, or why there is none.

Shapes: I inputs of a matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.errors import NumericalError

if TYPE_CHECKING:
    from torch import Tensor


def inverse(gram_II: Tensor, shift: float | Tensor) -> Tensor:
    """(A + shift · I)⁻¹ of a symmetric matrix. Raises NumericalError where it has no finite one."""
    import torch

    shifted_II = gram_II.clone()
    shifted_II.diagonal().add_(shift)
    failed = torch.zeros((), dtype=torch.int32, device=gram_II.device)
    torch.linalg.cholesky_ex(shifted_II, out=(shifted_II, failed))
    inverse_II = torch.cholesky_solve(torch.eye(len(gram_II), device=gram_II.device), shifted_II)
    if int(failed) or not torch.isfinite(inverse_II).all():
        raise no_inverse(len(gram_II))
    return inverse_II


def no_inverse(inputs: int) -> NumericalError:
    """What to say where the inputs' Gram matrix cannot be inverted."""
    return NumericalError(
        f"the Gram matrix of {inputs} inputs cannot be inverted, or is not finite; "
        "raise sparsity.method.damping or calibration.samples"
    )
