"""Positions of token windows that count in statistics: all but those of the begin-of-text token.

The hidden state of the begin-of-text token is a sink of attention (arXiv 2309.17453) with a norm hundreds of times
those of other tokens (arXiv 2402.17762). It takes part in attention as any other position, and in no sum over tokens.

Shapes: N windows, B windows of a batch, L sequence length, T counted tokens of a batch, X any features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class CopiedOnce:
    """Tensors on the host, which are copied to a device once, all together, when it first needs one of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._by_device = {_CPU: list(tensors)}

    def on(self, device: torch.device) -> list[Tensor]:
        """Return all of them on a device."""
        if device not in self._by_device:
            tensors = self._by_device[_CPU]
            flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device) if tensors else torch.empty(0)
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            self._by_device[device] = [part.view(like.shape) for part, like in zip(parts, tensors, strict=True)]
        return self._by_device[device]


class CountedPositions:
    """Counted positions of windows int64 [N, L], in batches of ``batch_size``.

    ``begin``: the ids of the begin-of-text tokens; without any all positions count. Where all do, every method returns
    its argument itself and nothing is copied to a device.
    """

    def __init__(self, windows_NL: Tensor, batch_size: int, *, begin: tuple[int, ...] = ()) -> None:
        self._windows_NL, self._batch_size, self._begin = windows_NL, batch_size, begin
        counted_NL = _counted_in(windows_NL, begin)
        masks = () if counted_NL is None else torch.split(counted_NL, batch_size)
        self.masks: tuple[Tensor, ...] | None = None if counted_NL is None else tuple(masks)  # bool [B, L], on the CPU
        self._on_devices = CopiedOnce(masks)
        self._rows = CopiedOnce([_true_in(mask_BL) for mask_BL in masks])
        self._others = CopiedOnce([_true_in(~mask_BL) for mask_BL in masks])

    def within(self, tokens: slice) -> CountedPositions:
        """Return the counted positions among these tokens of each window."""
        if self.masks is None or tokens == slice(None):
            return self
        return CountedPositions(self._windows_NL[:, tokens], self._batch_size, begin=self._begin)

    def rows(self, batch: int, device: torch.device) -> Tensor | None:
        """Return the counted positions of a batch as indices [T] into its B · L tokens; None where all count."""
        return None if self.masks is None else self._rows.on(device)[batch]

    def others(self, batch: int, device: torch.device) -> Tensor:
        """Return the positions of a batch that do not count, as indices into its B · L tokens."""
        return torch.zeros(0, dtype=torch.int64) if self.masks is None else self._others.on(device)[batch]

    def select(self, batch: int, value_BLX: Tensor) -> Tensor:
        """Return the values [T, X] of a batch at counted positions, of [B, L, X] or of [B · L, X].

        Where all positions count, the values themselves. So are those of a module that gets only some of the tokens.
        """
        rows_T = self.rows(batch, value_BLX.device)
        if rows_T is None or self.masks is None:
            return value_BLX
        value_TX = value_BLX.flatten(0, 1) if value_BLX.ndim > 2 else value_BLX
        if len(value_TX) != self.masks[batch].numel():
            return value_BLX
        return value_TX.index_select(0, rows_T)

    def zero_others(self, batch: int, value_BLX: Tensor) -> Tensor:
        """Return the values of a batch with zeros at positions that do not count."""
        if self.masks is None:
            return value_BLX
        return value_BLX.where(self._on_devices.on(value_BLX.device)[batch][..., None], 0)

    def targets(self, batch: int, device: torch.device) -> Tensor | None:
        """Return for each token but the first of a window if its prediction counts, bool [B, L - 1]; None where all do.

        The prediction of the token after a begin-of-text token counts, that of the latter does not.
        """
        return None if self.masks is None else self._on_devices.on(device)[batch][:, 1:]


def _true_in(mask_BL: Tensor) -> Tensor:
    return mask_BL.flatten().nonzero().squeeze(1)


def _counted_in(windows_NL: Tensor, begin: tuple[int, ...]) -> Tensor | None:
    """Return the positions that count, bool [N, L]; None where all of them do."""
    counted_NL = torch.isin(windows_NL, windows_NL.new_tensor(begin), invert=True)
    return None if bool(counted_NL.all()) else counted_NL
