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
class TokenChunk:
    """Tokens of a batch whose logits are computed together: some positions of some windows.

    ``all_positions``: the model computes the logits of whole windows.
    """

    windows: slice
    positions: slice
    all_positions: bool

    def logits(self, forward: LayerwiseForward, ids_BL: Tensor, *, hidden_BLD: Tensor) -> Tensor:
        """Return the logits [B, P, V] for hidden states of the batch after the last layer.

        They have gradients if those are enabled.
        """
        device = forward.decoder.device
        positions_P = None if self.all_positions else arange(self.positions.start, self.positions.stop, device=device)
        return forward.logits_of(ids_BL[self.windows], hidden_BLD[self.windows], positions_P=positions_P)

    def next_token_logits(self, forward: LayerwiseForward, ids_BL: Tensor, *, hidden_BLD: Tensor) -> Tensor:
        """Return the logits that predict a token: all but those at the last position of a window."""
        last = ids_BL.shape[1] - 1
        return self.logits(forward, ids_BL, hidden_BLD=hidden_BLD)[:, : last - self.positions.start]

    def targets(self, ids_BL: Tensor) -> Tensor:
        """Return the tokens [B, P] of the batch that ``next_token_logits`` predict."""
        return ids_BL[self.windows, 1:][:, self.positions]


def token_chunks(forward: LayerwiseForward, ids_BL: Tensor) -> Iterator[TokenChunk]:
    """Yield the chunks of a batch. Windows are whole where they fit: a small batch is one chunk.

    Positions before the first one that predicts a target that counts are left out where the model takes positions.

    A chunk has at most ``MAX_LOGITS`` logits, but at least one token of one window, or one window of a model whose
    forward does not take the positions of the logits.
    """
    skeleton = forward.decoder.skeleton
    count, length = ids_BL.shape
    vocabulary: int = text_config(skeleton.config).vocab_size
    at_once = max(MAX_LOGITS // (length * vocabulary), 1)
    begin = forward.targets.first - 1 if takes_positions(skeleton) else 0
    whole = not begin and (length * vocabulary <= MAX_LOGITS or not takes_positions(skeleton))
    positions = length if whole else max(MAX_LOGITS // vocabulary, 1)
    for first in range(0, count, at_once):
        for start in range(begin, length, positions):
            yield TokenChunk(
                slice(first, min(first + at_once, count)), slice(start, min(start + positions, length)), whole
            )
