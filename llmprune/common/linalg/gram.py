"""Gram matrices XᵀX summed over batches; they are symmetric, so only the upper triangle is computed, in blocks.

Shapes: T tokens, F inputs of a projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.linalg.precision import exact_products

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS = 4  # of rows and of columns: 10 of the 16 blocks are computed


@exact_products()
def add_gram(gram_FF: Tensor, input_TF: Tensor) -> None:
    """Add XᵀX to the blocks of ``gram_FF`` that contain its upper triangle, in place."""
    width = gram_FF.shape[0]
    step = -(-width // _BLOCKS)
    for start in range(0, width, step):
        rows = slice(start, start + step)
        gram_FF[rows, start:].addmm_(input_TF[:, rows].T, input_TF[:, start:])


def gram_operations(width: int) -> float:
    """Return the operations of adding one token to XᵀX [F, F]: 2 F² for all blocks, of which some are computed."""
    return (_BLOCKS + 1) / _BLOCKS * width**2


def mirror(gram_FF: Tensor) -> None:
    """Copy the upper triangle to the lower one, in place."""
    width = gram_FF.shape[0]
    step = -(-width // _BLOCKS)
    for start in range(0, width, step):
        block = slice(start, start + step)
        gram_FF[start + step :, block] = gram_FF[block, start + step :].T
        square = gram_FF[block, block]
        square.copy_(square.triu() + square.triu(1).T)
