"""Folds of the calibration windows: groups that a solve does not see and is judged on.

A fold has the windows of one source, or half of all windows, or every eighth.

Shapes: N windows, B batch, L sequence length, T tokens, R windows of a fold in a batch.
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
        batches = torch.split(windows_of_process(folds_N), batch_size)
        self._rows = {torch.device("cpu"): [_rows_of_folds(folds_B) for folds_B in batches]}

    def parts(self, batch: int, *values: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each fold that has windows in the batch, and its tokens [T, …] of values [B, L, …] on one device."""
        for fold, rows_R in self._rows_on(values[0].device)[batch].items():
            parts = values if rows_R is None else [value.index_select(0, rows_R) for value in values]
            yield fold, [part.flatten(0, 1) for part in parts]

    def _rows_on(self, device: torch.device) -> list[dict[int, Tensor | None]]:
        """Return the rows of each fold of each batch as indices on a device, copied there once, all together."""
        if device not in self._rows:
            batches = self._rows[torch.device("cpu")]
            mixed = [rows_R for folds in batches for rows_R in folds.values() if rows_R is not None]
            copied = iter(torch.split(torch.cat(mixed).to(device), [*map(len, mixed)]) if mixed else ())
            self._rows[device] = [
                {fold: None if rows_R is None else next(copied) for fold, rows_R in folds.items()} for folds in batches
            ]
        return self._rows[device]


def _rows_of_folds(folds_B: Tensor) -> dict[int, Tensor | None]:
    """Return the rows [R] of each fold in a batch, by fold; None where all are of one, so that nothing is copied."""
    found = sorted(set(folds_B.tolist()))
    return {fold: (folds_B == fold).nonzero().squeeze(1) if len(found) > 1 else None for fold in found}


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
