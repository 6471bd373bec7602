"""Parts of a batch by the source of its text, so that one forward pass sums the scores of every source apart.

Only positions that count are in them (``layerwise.counted_positions``).

Shapes: N windows, B windows of a batch, L sequence length, T tokens, R windows of a source in a batch, X any features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.anatomy.expert_hooks import TokenGroups
from llmprune.common.errors import CalibrationError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.window_groups import WindowGroups


class SourceParts:
    """Sources of the windows of a forward pass. ``count``: their number, 1 where they are not told apart.

    ``sources_N``: the source of each window of all processes. ``tokens``: those of each window that are scored.
    """

    def __init__(
        self,
        forward: LayerwiseForward,
        sources_N: Tensor | None = None,
        *,
        batch_size: int = 1,
        tokens: slice = slice(None),
    ) -> None:
        self.forward, self._sources_N, self._batch_size = forward, sources_N, batch_size
        self._counted = forward.counted.within(tokens)
        self._positions = self._windows = None
        if sources_N is not None:
            self._positions = WindowGroups(sources_N, batch_size, counted=self._counted)
            self._windows = WindowGroups(sources_N, batch_size)
        self.count = 1 if self._windows is None else self._windows.count

    def within(self, tokens: slice) -> SourceParts:
        """Return the parts that these tokens of each window are in."""
        if tokens == slice(None):
            return self
        return SourceParts(self.forward, self._sources_N, batch_size=self._batch_size, tokens=tokens)

    def of(self, batch: int, *values: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield each source in a batch, and its tokens [T, X] of values [B, L, X], or [B · L, X] of all tokens.

        With one source and every position counted, the values themselves. Raises CalibrationError where sources are
        told apart and values [T, X] are not those of all tokens.
        """
        if self._positions is None:
            yield 0, [self._counted.select(batch, value) for value in values]
            return
        ids_BL = self.forward.batches[batch]
        if any(value.ndim == 2 and len(value) != ids_BL.numel() for value in values):
            raise CalibrationError(
                "scores cannot be summed by source: some layers of this model see only some of the tokens; "
                "set calibration.combine to pooled"
            )
        yield from self._positions.parts(batch, *(value.view(len(ids_BL), -1, value.shape[-1]) for value in values))

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

    def tokens_of_running(self, device: torch.device) -> TokenGroups:
        """Return the indices of each source's counted tokens among the B · L of the batch that a layer is running."""
        batch = self.forward.running
        index_BL1 = torch.arange(self.forward.batches[batch].numel(), device=device)
        index_BL1 = index_BL1.view(*self.forward.batches[batch].shape, 1)
        seen = tuple((source, part.flatten()) for source, (part,) in self.of(batch, index_BL1))
        return TokenGroups(seen, self.others_of_running(device))

    def counted_of_running(self, device: torch.device) -> Tensor | None:
        """Return the indices of counted tokens of the batch that a layer is running, int64 [T]; None: all count."""
        return self._counted.rows(self.forward.running, device)

    def others_of_running(self, device: torch.device) -> Tensor:
        """Return the indices of the other tokens of the batch that a layer is running."""
        return self._counted.others(self.forward.running, device)

    def source_of_counted(self, device: torch.device) -> Tensor:
        """Return the source of each counted token of the batch that a layer is running, int64 [T]."""
        batch = self.forward.running
        source_T = torch.zeros(self.forward.batches[batch].numel(), dtype=torch.int64, device=device)
        for source, token_T in self.tokens_of_running(device).seen:
            source_T.index_fill_(0, token_T, source)
        rows_T = self.counted_of_running(device)
        return source_T if rows_T is None else source_T.index_select(0, rows_T)
