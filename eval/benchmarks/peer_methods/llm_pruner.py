"""LLM-Pruner: neurons by the first-order Taylor expansion of the loss, summed over the weights of each.

The score of a neuron is the sum of |weight x gradient| over its rows of gate and up projection and its column of the
down projection (the paper's element-wise importance of first order). Gradients are of the mean loss over ten windows,
as many as its examples have by default. Ma et al. 2023, https://arxiv.org/abs/2305.11627 (without its LoRA training)
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peer_methods.base import Peer, evenly_spaced
from peer_methods.surgery import highest, keep_neurons

WINDOWS = 10


class LLMPruner(Peer):
    """Neurons by weight times gradient, without repair."""

    removes = "neurons"
    _scores: list[Tensor] | None = None

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the neurons of the lowest score in every MLP."""
        if self._scores is None:
            self._scores = _scores(model, evenly_spaced(windows_NL, WINDOWS))
        keep_neurons(model, [highest(scores_F, amount) for scores_F in self._scores])
        return []


def _scores(model: PreTrainedModel, windows_NL: Tensor) -> list[Tensor]:
    """Return the scores [F] of each layer."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.requires_grad_(True)
    with torch.enable_grad():
        for ids_1L in torch.split(windows_NL, 1):
            torch.autograd.backward(model(input_ids=ids_1L, labels=ids_1L, use_cache=False).loss / len(windows_NL))
    scores = [
        sum(
            (linear.weight * linear.weight.grad).detach().abs().sum(dim)
            for linear, dim in ((layer.mlp.gate_proj, 1), (layer.mlp.up_proj, 1), (layer.mlp.down_proj, 0))
        )
        for layer in model.model.layers
    ]
    model.zero_grad()
    return scores
