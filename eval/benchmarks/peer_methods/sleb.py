"""SLEB: layers removed one at a time, each the one without which the perplexity is lowest.

The first and the last layer stay. Song et al. 2024, https://arxiv.org/abs/2402.09025

Shapes in names: B batch, L sequence length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import BATCH, Peer, evenly_spaced
from peer_methods.layer_calls import layer_keywords
from peer_methods.surgery import remove_layers

WINDOWS = 4  # of a trial; every removal tries all layers that are left


class SLEB(Peer):
    """Layers by greedy perplexity, without repair."""

    removes = "layers"
    _order: tuple[int, ...] = ()

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Continue the greedy order, and remove its first layers."""
        windows_NL = evenly_spaced(windows_NL, WINDOWS)
        keywords = layer_keywords(model, windows_NL[:1])
        while len(self._order) < amount:
            self._order += (_best_without(model, self._order, windows_NL, keywords),)
        removed = sorted(self._order[:amount])
        remove_layers(model, removed)
        return removed


@torch.no_grad()
def _best_without(
    model: PreTrainedModel, removed: Sequence[int], windows_NL: Tensor, keywords: list[dict[str, Any]]
) -> int:
    """Return the layer whose removal, after others, leaves the lowest loss. A trial begins at the layer left out."""
    layers = model.model.layers
    candidates = [layer for layer in range(1, len(layers) - 1) if layer not in removed]
    losses = dict.fromkeys(candidates, 0.0)
    for ids_BL in torch.split(windows_NL, BATCH):
        hidden_BLD = model.model.embed_tokens(ids_BL)
        for index in (at for at in range(len(layers)) if at not in removed):
            if index in losses:
                after_BLD = hidden_BLD
                for later in (at for at in range(index + 1, len(layers)) if at not in removed):
                    after_BLD = layers[later](after_BLD, **keywords[later])
                losses[index] += _loss(model, after_BLD, ids_BL)
            hidden_BLD = layers[index](hidden_BLD, **keywords[index])
    return min(losses, key=losses.__getitem__)


def _loss(model: PreTrainedModel, hidden_BLD: Tensor, ids_BL: Tensor) -> float:
    """Return the sum of the next-token cross entropy."""
    logits_BLV = model.lm_head(model.model.norm(hidden_BLD[:, :-1]))
    return torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum").item()
