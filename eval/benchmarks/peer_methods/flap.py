"""FLAP: neurons by the fluctuation of their activations; the mean of what is removed becomes a bias.

The score of neuron f is the variance of its activation times the squared norm of its column of the down projection
(the paper's WIFV). Every MLP loses the same number. The paper's other structure, sizes that differ by layer, is no
checkpoint that loads plainly. Where the configuration knows ``mlp_bias``, all three projections get one, zero in gate
and up; elsewhere only the down projection does. An et al. 2023, https://arxiv.org/abs/2312.11983

Shapes in names: T tokens of a batch, D hidden size, F neurons of an MLP, K kept neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peer_methods.base import Peer, Trace
from peer_methods.surgery import highest, keep_neurons_of_layer, set_width


class FLAP(Peer):
    """Neurons by weighted variance, with a bias in place of the removed ones."""

    removes = "neurons"

    def __init__(self, amounts: Sequence[int]) -> None:
        """Sum activations and their squares, layer by layer."""
        super().__init__(amounts)
        self._sums: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._tokens = 0

    def observe(self, trace: Trace) -> None:
        """Add a batch."""
        for layer, neurons_BLF in enumerate(trace.neurons_BLF):
            neurons_TF = neurons_BLF.flatten(0, 1).double()
            self._sums[layer] = self._sums.get(layer, 0) + neurons_TF.sum(0)
            self._squares[layer] = self._squares.get(layer, 0) + neurons_TF.square().sum(0)
        self._tokens += trace.neurons_BLF[0].shape[:2].numel()

    def prune(self, model: PreTrainedModel, amount: int, windows_NL: Tensor) -> list[int]:
        """Remove the neurons of the lowest score and add their mean output."""
        everywhere = hasattr(model.config, "mlp_bias")
        for index, layer in enumerate(model.model.layers):
            mean_F = self._sums[index] / self._tokens
            variance_F = self._squares[index] / self._tokens - mean_F.square()
            weight_DF = layer.mlp.down_proj.weight.detach().double()
            kept_K = highest(variance_F * weight_DF.square().sum(0), amount)
            mean_F[kept_K] = 0
            keep_neurons_of_layer(layer, kept_K)
            layer.mlp.down_proj.bias = nn.Parameter((weight_DF @ mean_F).float())
            if everywhere:
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.bias = nn.Parameter(torch.zeros(len(kept_K)))
        if everywhere:
            model.config.mlp_bias = True
        set_width(model, len(kept_K))
        return []
