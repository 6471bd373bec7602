"""Folds of the calibration windows: groups that a solve does not see and is judged on.

A fold has the windows of one source, or half of all windows, or every eighth.

Shapes: N windows, B batch, L sequence length, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.common.distributed import windows_of_process
from llmprune.recipe.refit import MOST_FOLDS


class Folds:
    """Folds of this process's windows, batch by batch. ``folds_N``: the fold of each window of all processes."""

    def __init__(self, folds_N: Tensor, batch_size: int) -> None:
        self.count = int(folds_N.max()) + 1
        self._batches = torch.split(windows_of_process(folds_N), batch_size)

    def parts(self, batch: int, *values: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each fold that has windows in the batch, and its tokens [T, …] of values [B, L, …]."""
        folds_B = self._batches[batch]
        found = sorted(set(folds_B.tolist()))
        for fold in found:
            rows = folds_B == fold if len(found) > 1 else slice(None)  # a slice copies nothing
            yield fold, [value[rows].flatten(0, 1) for value in values]


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
