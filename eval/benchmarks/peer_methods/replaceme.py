"""ReplaceMe: a linear map stands in for a block of layers, by least squares.

With M what the MLP before the block adds to the residual stream, H the stream before the block and H' behind it, the
map T minimises |M T - (H' - (H - M))|² without ridge; M T takes the place of M. Where no norm stands behind the down
projection, T is merged into it. The block has the least cosine distance and a layer before it. Shopkhoev et al. 2025,
https://arxiv.org/abs/2505.02819

Shapes in names: T tokens of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peer_methods.base import DecoderLayer, Peer, Trace, residual_writer
from peer_methods.similarity import SpanDistances, cosine_distance, nearest_block
from peer_methods.surgery import map_output, remove_layers


class ReplaceMe(Peer):
    """A block of layers replaced by a linear map of the MLP output before it."""

    removes = "layers"

    def __init__(self, amounts: Sequence[int]) -> None:
        """Measure spans, and sum products for every block."""
        super().__init__(amounts)
        self._distances = SpanDistances(self.amounts, cosine_distance)
        self._grams: dict[int, Tensor] = {}  # first layer of the block -> Mᵀ M
        self._changes: dict[tuple[int, int], Tensor] = {}  # first layer, length -> Mᵀ (H' - H)

    def observe(self, trace: Trace) -> None:
        """Add a batch."""
        self._distances.add(trace)
        for start in range(1, len(trace.written_BLD)):
            written_TD = trace.written_BLD[start - 1].flatten(0, 1)
            self._grams[start] = self._grams.get(start, 0) + (written_TD.T @ written_TD).double()
            for amount in self.amounts:
                if start + amount < len(trace.hidden_BLD):
                    change_TD = (trace.hidden_BLD[start + amount] - trace.hidden_BLD[start]).flatten(0, 1)
                    key = start, amount
                    self._changes[key] = self._changes.get(key, 0) + (written_TD.T @ change_TD).double()

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the block, and map what the MLP before it writes."""
        distances = self._distances.of_span(amount)
        start = nearest_block(distances, [at for at in distances if at > 0])
        gram_DD, change_DD = self._grams[start], self._changes[start, amount]
        map_DD = (torch.eye(len(gram_DD), dtype=torch.float64) + torch.linalg.solve(gram_DD, change_DD)).T
        layer: DecoderLayer = model.model.layers[start - 1]
        writer = residual_writer(layer)
        if writer is layer.mlp:
            down: nn.Linear = writer.down_proj
            down.weight = nn.Parameter((map_DD @ down.weight.detach().double()).float())
        else:
            map_output(writer, map_DD)
        removed = list(range(start, start + amount))
        remove_layers(model, removed)
        return removed
