"""ShortGPT: the layers with the least block influence are removed at once.

Block influence of a layer is 1 - the mean cosine similarity of the residual stream before and behind it, over all
tokens. Men et al. 2024, https://arxiv.org/abs/2403.03853
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import Peer, Trace
from peer_methods.similarity import SpanDistances, cosine_distance
from peer_methods.surgery import remove_layers


class ShortGPT(Peer):
    """Layers by block influence, one-shot, without repair."""

    removes = "layers"

    def __init__(self, amounts: Sequence[int]) -> None:
        """Count cosines layer by layer."""
        super().__init__(amounts)
        self._influence = SpanDistances((1,), cosine_distance)

    def observe(self, trace: Trace) -> None:
        """Add a batch to the influences."""
        self._influence.add(trace)

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the layers with the least influence."""
        influence = self._influence.of_span(1)
        removed = sorted(sorted(influence, key=influence.__getitem__)[:amount])
        remove_layers(model, removed)
        return removed
