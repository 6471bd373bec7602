"""Parts of a batch by the source of its text, so that one forward pass sums the scores of every source apart.

Shapes: N windows, B windows of a batch, L sequence length, T tokens, R windows of a source in a batch, X any features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from llmprune.common.errors import CalibrationError
from llmprune.criteria.accumulators.base import Accumulator, pooled
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.window_groups import WindowGroups

A = TypeVar("A", bound=Accumulator)


class SourceParts:
    """Sources of the windows of a forward pass. ``count``: their number, 1 where they are not told apart.

    ``sources_N``: the source of each window of all processes. ``is_pooled``: their sums are added up before scores are
    made of them, each source with the weight of the first, whatever its number of windows.
    """

    def __init__(
        self,
        forward: LayerwiseForward,
        sources_N: Tensor | None = None,
        *,
        batch_size: int = 1,
        is_pooled: bool = False,
    ) -> None:
        self.forward, self.is_pooled = forward, is_pooled
        self._windows = None if sources_N is None else WindowGroups(sources_N, batch_size)
        self.count = 1 if self._windows is None else self._windows.count
        windows = [1.0] if sources_N is None else sources_N.bincount().tolist()
        self._weights = [windows[0] / own for own in windows]

    @property
    def scored(self) -> int:
        """Number of sources that get scores of their own; 1 where they are pooled."""
        return 1 if self.is_pooled else self.count

    def merged(self, accumulators: Sequence[A]) -> Sequence[A]:
        """Return the accumulators that give the scores: one for each source, or a single one of pooled sources."""
        return pooled(accumulators, self._weights) if self.is_pooled else accumulators

    def of(self, batch: int, *values: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield each source in a batch, and its tokens [T, X] of values [B, L, X], or [B · L, X] of all tokens.

        With one source the values themselves. Values [T, X] that are not those of all tokens are taken for the first
        source's where sources are pooled. Raises CalibrationError where they are told apart.
        """
        if self._windows is None:
            yield 0, values
            return
        ids_BL = self.forward.batches[batch]
        unknown = any(value.ndim == 2 and len(value) != ids_BL.numel() for value in values)
        if unknown and self.is_pooled:
            yield 0, values
            return
        if unknown:
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
