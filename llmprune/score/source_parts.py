"""Parts of a batch by the source of its text, so that one forward pass sums the scores of every source apart.

Shapes: N windows, B windows of a batch, L sequence length, T tokens, X any features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.common.errors import CalibrationError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.score.inputs import CalibrationBatches


class SourceParts:
    """Sources of the windows of a forward pass over the calibration. ``count``: their number, 1 if not told apart."""

    def __init__(self, forward: LayerwiseForward, calibration: CalibrationBatches) -> None:
        self.forward, sources_N = forward, calibration.sources_N
        self._groups = None if sources_N is None else WindowGroups(sources_N, calibration.batch_size)
        self.count = 1 if self._groups is None else self._groups.count

    def of(self, batch: int, *values: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield each source in a batch, and its windows [R, L, X] of values [B, L, X], or [B · L, X] of all tokens.

        With one source the values themselves. Raises CalibrationError where values [T, X] are not those of all tokens.
        """
        if self._groups is None:
            yield 0, values
            return
        ids_BL = self.forward.batches[batch]
        if any(value.ndim == 2 and len(value) != ids_BL.numel() for value in values):
            raise CalibrationError(
                "scores cannot be summed by source: some layers of this model see only some of the tokens; "
                "set calibration.combine to pooled"
            )
        of_windows = [value.view(len(ids_BL), -1, value.shape[-1]) for value in values]
        for source, parts in self._groups.parts(batch, *of_windows):
            pairs = zip(parts, of_windows, strict=True)
            yield source, [part.view(-1, *value.shape[1:]) for part, value in pairs]

    def of_running(self, *values: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield the parts of values in the batch that a layer is running, for hooks."""
        return self.of(self.forward.running, *values)

    def tokens_of_running(self, device: torch.device) -> list[tuple[int, Tensor]]:
        """Return each source in the batch that a layer is running, and the indices of its tokens [T] among B · L."""
        windows, length = self.forward.batches[self.forward.running].shape
        index_BL = torch.arange(windows * length, device=device).view(windows, length)
        return [(source, part.flatten()) for source, (part,) in self.of_running(index_BL.unsqueeze(-1))]

    def source_of_tokens(self, device: torch.device) -> Tensor:
        """Return the source of each token of the batch that a layer is running, int64 [B · L]."""
        source_T = torch.zeros(self.forward.batches[self.forward.running].numel(), dtype=torch.int64, device=device)
        for source, token_T in self.tokens_of_running(device):
            source_T.index_fill_(0, token_T, source)
        return source_T
