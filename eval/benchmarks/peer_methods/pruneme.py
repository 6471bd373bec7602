"""PruneMe: one block of consecutive layers, the one whose input and output have the least angular distance.

Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", https://arxiv.org/abs/2403.17887; the
distance is over all tokens of the windows, as in arcee's PruneMe.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import Peer, Trace
from peer_methods.similarity import SpanDistances, angular_distance, nearest_block
from peer_methods.surgery import remove_layers


class PruneMe(Peer):
    """A block of layers by angular distance, without repair."""

    removes = "layers"

    def __init__(self, amounts: Sequence[int]) -> None:
        """Measure angles over spans of the lengths that will be removed."""
        super().__init__(amounts)
        self._distances = SpanDistances(self.amounts, angular_distance)

    def observe(self, trace: Trace) -> None:
        """Add a batch to the distances."""
        self._distances.add(trace)

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the block with the least distance."""
        distances = self._distances.of_span(amount)
        start = nearest_block(distances, list(distances))
        removed = list(range(start, start + amount))
        remove_layers(model, removed)
        return removed
