"""Sentences about the weights of layers: their sparsity, and their training after the closed form."""

from __future__ import annotations

from llmprune.results.figures.layers import BlockFigures, SparsityFigures
from llmprune.results.formatting import NOTHING, fixed, plural


def describe_sparsity(found: SparsityFigures) -> str:
    """Return a sentence with the zeros and groups counted in the saved file."""
    text = (
        f"{found.pattern} by {found.method}: {found.zeros:,} of the {found.weights:,} weights in "
        f"{plural(found.matrices, 'matrix', many='matrices')} are zero"
    )
    if found.permuted:
        text += f"; MLP neurons and value channels were ordered for the pattern in {found.permuted:,} of them"
    if found.groups:
        text += f"; all {found.groups:,} groups were counted in the saved file, {found.violations:,} break the pattern"
    return f"{text}. Zeros are stored: the file is not smaller, and only kernels for the pattern run it faster."


def describe_training(block: BlockFigures | None) -> str:
    """Return the held-out error of a layer before and after its training: ``0.212 → 0.145 (84 steps)``."""
    if block is None:
        return NOTHING
    if not block.steps:
        return "not trained" if block.steps is None else f"{fixed(block.before)}, kept"
    return f"{fixed(block.before)} → {fixed(block.after)} ({plural(block.steps, 'step')})"
