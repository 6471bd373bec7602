"""Changes of a model that peers make: layers and neurons removed, and linear maps behind a module.

Shapes in names: D hidden size, F neurons of an MLP, K kept neurons.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peer_methods.base import DecoderLayer


def remove_layers(model: PreTrainedModel, removed: Collection[int]) -> None:
    """Remove layers, and their entries of the configuration."""
    kept = [index for index in range(len(model.model.layers)) if index not in removed]
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kinds[index] for index in kept]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index


def keep_neurons(model: PreTrainedModel, kept: Sequence[Tensor]) -> None:
    """Keep some neurons of every MLP. ``kept``: ascending indices [K] for each layer."""
    for layer, kept_K in zip(model.model.layers, kept, strict=True):
        keep_neurons_of_layer(layer, kept_K)
    set_width(model, len(kept[0]))


def keep_neurons_of_layer(layer: DecoderLayer, kept_K: Tensor) -> None:
    """Keep some neurons of a layer's MLP."""
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight.detach()[kept_K])
        linear.out_features = len(kept_K)
    down = layer.mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach()[:, kept_K])
    down.in_features = len(kept_K)


def set_width(model: PreTrainedModel, neurons: int) -> None:
    """Record the number of neurons of each MLP in the configuration."""
    model.config.intermediate_size = neurons
    for layer in model.model.layers:
        layer.mlp.intermediate_size = neurons


def highest(scores_F: Tensor, removed: int) -> Tensor:
    """Return the indices [K] of all but so many units with the lowest scores, ascending."""
    return scores_F.topk(len(scores_F) - removed).indices.sort().values


def map_output(module: nn.Module, weight_DD: Tensor) -> None:
    """Multiply the output of a module by a matrix that becomes its submodule: ``y -> weight_DD y``."""
    size = len(weight_DD)
    module.output_map = nn.Linear(size, size, bias=False)
    module.output_map.weight = nn.Parameter(weight_DD.float())
    module.register_forward_hook(_mapped)


def _mapped(module: Any, _inputs: Any, output: Tensor) -> Tensor:
    mapped: Tensor = module.output_map(output)
    return mapped


@torch.no_grad()
def scale_written(layer: DecoderLayer, factor: float) -> None:
    """Multiply what attention and MLP add to the residual stream: norms behind them, or else their output projections.

    Some norms store their gain minus one; with a weight of zero those pass their input on.
    """
    if not hasattr(layer, "post_feedforward_layernorm"):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(factor)
        return
    for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
        stored = norm.weight.clone()
        norm.weight.zero_()
        offset = norm(torch.ones(1, len(stored))).mean().round()
        norm.weight.copy_(factor * (stored + offset) - offset)
