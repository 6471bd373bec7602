"""Parts of a batch by the source of its text, so that one forward pass sums the scores of every source apart.

Shapes: N windows, B windows of a batch, L sequence length, T tokens, R windows of a source in a batch, X any features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.common.errors import CalibrationError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.window_groups import WindowGroups


class SourceParts:
    """Sources of the windows of a forward pass. ``count``: their number, 1 where they are not told apart.

    ``sources_N``: the source of each window of all processes.
    """

    def __init__(self, forward: LayerwiseForward, sources_N: Tensor | None = None, *, batch_size: int = 1) -> None:
        self.forward = forward
        self._windows = None if sources_N is None else WindowGroups(sources_N, batch_size)
        self.count = 1 if self._windows is None else self._windows.count

    def of(self, batch: int, *values: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield each source in a batch, and its tokens [T, X] of values [B, L, X], or [B · L, X] of all tokens.

        With one source the values themselves. Raises CalibrationError where sources are
        told apart and values [T, X] are not those of all tokens.
        """
        if self._windows is None:
            yield 0, values
            return
        ids_BL = self.forward.batches[batch]
        if any(value.ndim == 2 and len(value) != ids_BL.numel() for value in values):
            raise CalibrationError(
                "scores cannot be summed by source: some layers of this model see only some of the tokens; "
                "set calibration.combine to pooled"
            )
        yield from self._windows.parts(batch, *(value.view(len(ids_BL), -1, value.shape[-1]) for value in values))

    def of_running(self, *values: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield the parts of values in the batch that a layer is running, for hooks."""
        return self.of(self.forward.running, *values)

    def windows(self, batch: int, value_BLX: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each source in a batch, and its windows [R, L, X] with all positions."""
        if self._windows is None:
            yield 0, value_BLX
            return
        for source, (value_TX,) in self._windows.parts(batch, value_BLX):
            yield source, value_TX.view(-1, *value_BLX.shape[1:])

    def tokens_of_running(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Yield each source in the batch that a layer is running, and the indices [T] of its tokens among all B · L."""
        ids_BL = self.forward.batches[self.forward.running]
        index_BL1 = torch.arange(ids_BL.numel(), device=device).view(*ids_BL.shape, 1)
        for source, (index_T1,) in self.of_running(index_BL1):
            yield source, index_T1.flatten()

    def source_of_running(self, device: torch.device) -> Tensor:
        """Return the source of each token of the batch that a layer is running, int64 [T]."""
        source_T = torch.zeros(self.forward.batches[self.forward.running].numel(), dtype=torch.int64, device=device)
        for source, token_T in self.tokens_of_running(device):
            source_T.index_fill_(0, token_T, source)
        return source_T
