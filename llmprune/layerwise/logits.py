"""Logits of hidden states in chunks of tokens, because those of a large vocabulary do not fit in memory together.

Four windows of 2048 tokens have 5 GB of float32 logits at a vocabulary of 150,000.

Shapes: B windows, L sequence length, P positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, arange

from llmprune.anatomy.meta_model import text_config
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.layer_calls import takes_positions

# Logits of a chunk: 256 MiB in float32. A chunk of that size has 447 tokens at a vocabulary of 150,000, enough for the
# head to compute at full speed. It is the same on every device, so that no figure depends on the device.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class LogitsChunk:
    """Logits [B, P, V] of some windows of a batch at some of their positions."""

    windows: slice
    positions: slice
    logits_BPV: Tensor

    def next_tokens(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [B, P, V] that predict a token of the batch ``ids_BL``, and these tokens [B, P].

        The last position of a window predicts none.
        """
        targets_BP = ids_BL[self.windows, 1:][:, self.positions].to(self.logits_BPV.device)
        return self.logits_BPV[:, : targets_BP.shape[1]], targets_BP


def logits_in_chunks(forward: LayerwiseForward, ids_BL: Tensor, *, hidden_BLD: Tensor) -> Iterator[LogitsChunk]:
    """Yield the logits for hidden states after the last layer, with gradients if those are enabled.

    A chunk has at most ``MAX_LOGITS`` logits, but at least one token of one window, or one window of a model whose
    forward does not take the positions of the logits. Windows are whole where they fit: a small batch is one chunk.
    """
    skeleton = forward.decoder.skeleton
    count, length = ids_BL.shape
    hidden_BLD = hidden_BLD.to(forward.decoder.device)  # once, not for every chunk
    vocabulary: int = text_config(skeleton.config).vocab_size
    at_once = max(MAX_LOGITS // (length * vocabulary), 1)
    whole = length * vocabulary <= MAX_LOGITS or not takes_positions(skeleton)
    positions = length if whole else max(MAX_LOGITS // vocabulary, 1)
    for first in range(0, count, at_once):
        windows = slice(first, min(first + at_once, count))
        for start in range(0, length, positions):
            part = slice(start, min(start + positions, length))
            positions_P = None if whole else arange(part.start, part.stop)
            yield LogitsChunk(
                windows, part, forward.logits_of(ids_BL[windows], hidden_BLD[windows], positions_P=positions_P)
            )
