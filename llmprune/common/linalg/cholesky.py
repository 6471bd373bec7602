"""Cholesky factors and inverses of damped Gram matrices.

Shapes: I inputs of a weight matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.errors import NumericalError

if TYPE_CHECKING:
    from torch import Tensor


def mean_diagonal(gram_II: Tensor, strength: float) -> Tensor:
    """Return ``strength`` times the mean of the diagonal, as a scalar to add to it; above 0 for a zero matrix too."""
    return (strength * gram_II.diagonal().mean()).clamp_min(1e-30)


def factorize(matrix_II: Tensor, *, upper: bool = False, in_place: bool = False) -> Tensor | None:
    """Return the Cholesky factor of a symmetric matrix, or None where the matrix is not positive definite.

    ``upper``: the upper factor; only that triangle is read. ``in_place``: the factor replaces the matrix.
    """
    if in_place:
        factor_II, failed = factorize_in_place(matrix_II, upper=upper)
    else:
        import torch

        factor_II, failed = torch.linalg.cholesky_ex(matrix_II, upper=upper)
    return None if int(failed) else factor_II


def factorize_in_place(matrix_II: Tensor, *, upper: bool) -> tuple[Tensor, Tensor]:
    """Replace a symmetric matrix by its Cholesky factor; return that, and a scalar that is not 0 where it has none.

    Nothing waits for the device.
    """
    import torch

    failed = torch.zeros((), dtype=torch.int32, device=matrix_II.device)
    torch.linalg.cholesky_ex(matrix_II, upper=upper, out=(matrix_II, failed))
    return matrix_II, failed


def inverse(gram_II: Tensor, shift: float | Tensor, *, setting: str) -> Tensor:
    """Return (A + shift · I)⁻¹ of a symmetric matrix.

    Raises NumericalError where it has no finite inverse; ``setting`` is the place of the shift in the recipe.
    """
    import torch

    shifted_II = gram_II.clone()
    shifted_II.diagonal().add_(shift)
    factor_II = factorize(shifted_II, in_place=True)
    if factor_II is None:
        raise singular(len(gram_II), setting)
    inverse_II = torch.cholesky_solve(torch.eye(len(gram_II), device=gram_II.device), factor_II)
    if not torch.isfinite(inverse_II).all():
        raise singular(len(gram_II), setting)
    return inverse_II


def singular(inputs: int, setting: str) -> NumericalError:
    """Return the error for a Gram matrix that has no inverse; ``setting`` is what to raise in the recipe."""
    return NumericalError(
        f"the Gram matrix of {inputs} inputs cannot be inverted, or is not finite; "
        f"raise {setting} or calibration.samples"
    )
