"""Zeros of a sparse model, which the training leaves zero.

A matrix of a layer whose weights are zero in a noticeable share is sparse, whatever its pattern is; single zeros of a
dense matrix are chance.

Shapes: X any.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

_SPARSE = 0.01  # least share of zeros of a sparse matrix


def zeros_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return by name where the sparse ones of some matrices are zero, bool [X]; dense matrices have no entry."""
    found = {}
    for name, weight_X in parameters:
        if weight_X.ndim > 1 and weight_X.numel():
            zero_X = weight_X == 0
            if float(zero_X.float().mean()) >= _SPARSE:
                found[name] = zero_X
    return found
