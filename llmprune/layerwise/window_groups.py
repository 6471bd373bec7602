"""Groups of the calibration windows that statistics are kept apart for: the sources of text, or folds of a solve.

Shapes: N windows, B batch, L sequence length, T tokens, R windows of a group in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.common.distributed import windows_of_process


class WindowGroups:
    """Groups of this process's windows, batch by batch. ``groups_N``: the group of each window of all processes.

    ``weights``: of each group's windows, in sums of products of two values; none: all the same. ``one_source``: the
    groups are parts of a single source.
    """

    def __init__(
        self, groups_N: Tensor, batch_size: int, *, weights: Sequence[float] = (), one_source: bool = False
    ) -> None:
        self.count, self.one_source = int(groups_N.max()) + 1, one_source
        self._factors: list[float] = [float(weight) ** 0.5 for weight in weights] or [1.0] * self.count
        self._batches = torch.split(windows_of_process(groups_N), batch_size)
        self._rows = {torch.device("cpu"): [_windows_of_groups(groups_B) for groups_B in self._batches]}

    def parts(self, batch: int, *values: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each group that has windows in the batch, and its tokens [T, …] of values [B, L, …] on one device.

        Values are multiplied by the square root of the group's weight.
        """
        for group, rows_R in self._rows_on(values[0].device)[batch].items():
            parts = values if rows_R is None else [value.index_select(0, rows_R) for value in values]
            if self._factors[group] != 1:
                parts = [part * self._factors[group] for part in parts]
            yield group, [part.flatten(0, 1) for part in parts]

    def of_tokens(self, batch: int, tokens: int) -> Tensor:
        """Return the group of each of the ``tokens`` tokens of a batch, int64 [T], on the CPU."""
        groups_B = self._batches[batch]
        return groups_B.repeat_interleave(tokens // len(groups_B))

    def factor(self, group: int) -> float:
        """Return the square root of a group's weight, by which ``parts`` multiplies values."""
        return self._factors[group]

    def _rows_on(self, device: torch.device) -> list[dict[int, Tensor | None]]:
        """Return the rows of each group of each batch as indices on a device, copied there once, all together."""
        if device not in self._rows:
            batches = self._rows[torch.device("cpu")]
            mixed = [rows_R for groups in batches for rows_R in groups.values() if rows_R is not None]
            copied = iter(torch.split(torch.cat(mixed).to(device), [*map(len, mixed)]) if mixed else ())
            self._rows[device] = [
                {group: None if rows_R is None else next(copied) for group, rows_R in groups.items()}
                for groups in batches
            ]
        return self._rows[device]


def _windows_of_groups(groups_B: Tensor) -> dict[int, Tensor | None]:
    """Return the windows [R] of each group in a batch; None where all are of one, so that nothing is copied."""
    found = sorted(set(groups_B.tolist()))
    return {group: (groups_B == group).nonzero().squeeze(1) if len(found) > 1 else None for group in found}
