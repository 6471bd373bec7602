"""Folds of the calibration windows: groups that a solve does not see and is judged on.

A fold has the windows of one source, or half of all windows, or every eighth.

Shapes: N windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.recipe.refit import MOST_FOLDS


def folds_of(windows: int, sources_N: Tensor | None) -> Tensor:
    """Return the fold of each window, int64 [N]: its source, or with a single source the half that it is in."""
    if sources_N is not None and len(set(sources_N.tolist())) > 1:
        return sources_N % MOST_FOLDS
    return torch.arange(windows) * 2 // max(windows, 2)


def every_eighth(windows: int) -> Tensor:
    """Return 1 for every eighth window, or the last of fewer, 0 for the others, int64 [N]. A single one gets 0."""
    held_out_N = torch.arange(windows) % 8 == 7
    if windows > 1 and not held_out_N.any():
        held_out_N[-1] = True
    return held_out_N.long()
