"""Least squares on a fixed support: the remaining weights are solved again, the pruned ones stay zero.

    minimise over W, zero outside the mask   tr((W − W*) A (W − W*)ᵀ)        A = XᵀX + μI

W* is the matrix without pruning: its dense weights, or those of the refit towards the dense hidden states, for which
this is the refit's own sum of squares up to a constant. Each output is a linear system of its own (the rows and columns
of A that it keeps), so no factor can be shared. Conjugate gradients solve all outputs at once with one product with A a
step (as ALPS does at its end, arXiv 2406.07831), preconditioned by diag(A), and never leave the support. From the
weights of the sparsity method few steps are enough.

Shapes: O outputs of a matrix, I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.linalg.precision import exact_products

if TYPE_CHECKING:
    from torch import Tensor


@exact_products()
def solve_on_support(
    weight_OI: Tensor, mask_OI: Tensor, *, gram_II: Tensor, wanted_OI: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the weights after ``steps`` steps from ``weight_OI``, and the squared error of each output [O], float32.

    ``gram_II``: A above, symmetric and positive definite; ``wanted_OI``: W*. No step increases the error.
    """
    scales_I = gram_II.diagonal()
    weight_OI = weight_OI * mask_OI
    missing_OI = wanted_OI - weight_OI
    residual_OI = missing_OI @ gram_II
    error_O = missing_OI.mul_(residual_OI).sum(1)
    residual_OI.mul_(mask_OI)
    scaled_OI = residual_OI / scales_I
    direction_OI = scaled_OI.clone()
    steepness_O1 = (residual_OI * scaled_OI).sum(1, keepdim=True)
    for _ in range(steps):
        change_OI = (direction_OI @ gram_II).mul_(mask_OI)
        curvature_O1 = (direction_OI * change_OI).sum(1, keepdim=True)
        length_O1 = steepness_O1 / curvature_O1.clamp_min(1e-30)
        weight_OI.addcmul_(length_O1, direction_OI)
        error_O.sub_((length_O1 * steepness_O1)[:, 0])
        residual_OI.addcmul_(length_O1, change_OI, value=-1)
        scaled_OI = residual_OI / scales_I
        before_O1, steepness_O1 = steepness_O1, (residual_OI * scaled_OI).sum(1, keepdim=True)
        direction_OI.mul_(steepness_O1 / before_O1.clamp_min(1e-30)).add_(scaled_OI)
    return weight_OI, error_O.clamp_min_(0)


@exact_products()
def output_energy(weight_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Return the squared norm ‖X wᵀ‖² of each output [O], from XᵀX alone."""
    return (weight_OI @ gram_II).mul_(weight_OI).sum(1)
