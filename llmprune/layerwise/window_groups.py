"""Groups of the calibration windows that statistics are kept apart for: the sources of text, or folds of a solve.

Shapes: N windows, B batch, L sequence length, T tokens, R windows or positions of a group in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.common.distributed import windows_of_process
from llmprune.layerwise.counted_positions import CopiedOnce, CountedPositions


class WindowGroups:
    """Groups of this process's windows, batch by batch.

    ``groups_N``: the group of each window of all processes. ``counted``: the positions of this process's windows that
    are in the groups; without it all are.
    """

    def __init__(self, groups_N: Tensor, batch_size: int, *, counted: CountedPositions | None = None) -> None:
        self.count = int(groups_N.max()) + 1
        batches = torch.split(windows_of_process(groups_N), batch_size)
        masks = counted.masks if counted else None
        if masks is None:
            found = [_windows_of_groups(groups_B) for groups_B in batches]
        else:
            pairs = zip(batches, masks, strict=True)
            found = [_positions_of_groups(groups_B, counted_BL) for groups_B, counted_BL in pairs]
        self._of_positions = masks is not None
        self._rows = CopiedOnce([rows_R for rows in found for rows_R in rows.values() if rows_R is not None])
        numbers = iter(range(sum(map(len, found))))
        self._places = [
            {group: None if rows_R is None else next(numbers) for group, rows_R in rows.items()} for rows in found
        ]

    def parts(self, batch: int, *values: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each group that has tokens in the batch, and its tokens [T, …] of values [B, L, …] on one device."""
        rows = self._rows.on(values[0].device)
        for group, place in self._places[batch].items():
            if place is None:
                yield group, [value.flatten(0, 1) for value in values]
            elif self._of_positions:
                yield group, [value.flatten(0, 1).index_select(0, rows[place]) for value in values]
            else:
                yield group, [value.index_select(0, rows[place]).flatten(0, 1) for value in values]


def _windows_of_groups(groups_B: Tensor) -> dict[int, Tensor | None]:
    """Return the windows [R] of each group in a batch; None where all are of one, so that nothing is copied."""
    found = sorted(set(groups_B.tolist()))
    return {group: (groups_B == group).nonzero().squeeze(1) if len(found) > 1 else None for group in found}


def _positions_of_groups(groups_B: Tensor, counted_BL: Tensor) -> dict[int, Tensor | None]:
    """Return the counted positions [R] of each group in a batch as indices into its B · L tokens, by group."""
    found = sorted(set(groups_B.tolist()))
    return {group: ((groups_B == group)[:, None] & counted_BL).flatten().nonzero().squeeze(1) for group in found}
