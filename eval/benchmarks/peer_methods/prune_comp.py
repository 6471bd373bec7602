"""Prune&Comp: layers removed one at a time, each followed by a compensation of the stream's magnitude.

The layer with the least block influence in the model so far is removed; a is the mean over windows of the ratio of the
mean absolute values behind the layer and before it. The method multiplies everything written before the gap by a. This
is computed by dividing what later layers write by a, which gives the same logits (every reader of the stream is behind
a norm) and keeps tied embeddings tied. Chen et al. 2025, https://arxiv.org/abs/2507.18212
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import BATCH, Peer, evenly_spaced, trace
from peer_methods.similarity import SpanDistances, cosine_distance
from peer_methods.surgery import remove_layers, scale_written

WINDOWS = 8  # of each step; every step is a forward pass


class PruneComp(Peer):
    """Layers by block influence, iteratively, with magnitude compensation."""

    removes = "layers"
    _steps: list[tuple[int, float]] | None = None  # layer of the model so far, and its ratio of magnitudes

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Repeat the steps on the model."""
        if self._steps is None:
            self._steps = _find_steps(copy.deepcopy(model), max(self.amounts), evenly_spaced(windows_NL, WINDOWS))
        left = list(range(len(model.model.layers)))
        removed = []
        for layer, ratio in self._steps[:amount]:
            removed.append(left.pop(layer))
            _step(model, layer, ratio)
        return sorted(removed)


def _find_steps(model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[tuple[int, float]]:
    """Remove layers from the model and return which."""
    steps = []
    for _ in range(amount):
        layer, ratio = _least_influence(model, windows_NL)
        steps.append((layer, ratio))
        _step(model, layer, ratio)
    return steps


@torch.no_grad()
def _least_influence(model: PreTrainedModel, windows_NL: Tensor) -> tuple[int, float]:
    influences = SpanDistances((1,), cosine_distance)
    ratios = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for ids_BL in torch.split(windows_NL, BATCH):
        seen = trace(model, ids_BL)
        influences.add(seen)
        sizes_SB = torch.stack([hidden_BLD.abs().mean((1, 2)) for hidden_BLD in seen.hidden_BLD])
        ratios += (sizes_SB[1:] / sizes_SB[:-1]).double().sum(1)
    influence = influences.of_span(1)
    layer = min(influence, key=influence.__getitem__)
    return layer, ratios[layer].item() / len(windows_NL)


def _step(model: PreTrainedModel, layer: int, ratio: float) -> None:
    remove_layers(model, [layer])
    for later in model.model.layers[layer:]:
        scale_written(later, 1 / ratio)
