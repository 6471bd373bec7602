"""Folds of the calibration windows: groups that a solve does not see and is judged on.

A fold has the windows of one source, or half of all windows, or every eighth.

Shapes: N windows, B batch, L sequence length, T tokens, R windows or positions of a fold in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.common.distributed import windows_of_process
from llmprune.layerwise.counted_positions import CopiedOnce, CountedPositions
from llmprune.recipe.refit import MOST_FOLDS


class Folds:
    """Folds of this process's windows, batch by batch.

    ``folds_N``: the fold of each window of all processes. ``counted``: the positions of this process's windows that are
    in the folds; without it all are.
    """

    def __init__(self, folds_N: Tensor, batch_size: int, *, counted: CountedPositions | None = None) -> None:
        self.count = int(folds_N.max()) + 1
        batches = torch.split(windows_of_process(folds_N), batch_size)
        masks = counted.masks if counted else None
        if masks is None:
            found = [_windows_of_folds(folds_B) for folds_B in batches]
        else:
            pairs = zip(batches, masks, strict=True)
            found = [_positions_of_folds(folds_B, counted_BL) for folds_B, counted_BL in pairs]
        self._of_positions = masks is not None
        self._rows = CopiedOnce([rows_R for folds in found for rows_R in folds.values() if rows_R is not None])
        numbers = iter(range(sum(map(len, found))))
        self._places = [
            {fold: None if rows_R is None else next(numbers) for fold, rows_R in folds.items()} for folds in found
        ]

    def parts(self, batch: int, *values: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each fold that has tokens in the batch, and its tokens [T, …] of values [B, L, …] on one device."""
        rows = self._rows.on(values[0].device)
        for fold, place in self._places[batch].items():
            if place is None:
                yield fold, [value.flatten(0, 1) for value in values]
            elif self._of_positions:
                yield fold, [value.flatten(0, 1).index_select(0, rows[place]) for value in values]
            else:
                yield fold, [value.index_select(0, rows[place]).flatten(0, 1) for value in values]


def _windows_of_folds(folds_B: Tensor) -> dict[int, Tensor | None]:
    """Return the windows [R] of each fold in a batch, by fold; None where all are of one, so that nothing is copied."""
    found = sorted(set(folds_B.tolist()))
    return {fold: (folds_B == fold).nonzero().squeeze(1) if len(found) > 1 else None for fold in found}


def _positions_of_folds(folds_B: Tensor, counted_BL: Tensor) -> dict[int, Tensor | None]:
    """Return the counted positions [R] of each fold in a batch as indices into its B · L tokens, by fold."""
    found = sorted(set(folds_B.tolist()))
    return {fold: ((folds_B == fold)[:, None] & counted_BL).flatten().nonzero().squeeze(1) for fold in found}


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
