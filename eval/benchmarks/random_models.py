"""Checkpoints of random weights in bfloat16, written a layer at a time, in seconds and without holding the model.

The first layer and the tensors outside the layers are saved by transformers, under the names and in the shapes of the
family's files. The other layers have the same tensors with other values.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig

_SCALE = 0.02
_TILE = 1_000_003  # values, a prime number, so that rows of a matrix differ
_LAYER = "model.layers.0."


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint, the bytes of all its weights and of one layer."""

    folder: Path
    bytes: int
    layer_bytes: int
    config: PretrainedConfig


def llama_1b(layers: int = 22, *, mlp: int = 5632) -> LlamaConfig:
    """TinyLlama-1.1B's shape, with another number of layers or MLP neurons."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )


def llama_8b(layers: int = 32) -> LlamaConfig:
    """Llama-3.1-8B's shape, with another number of layers."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def llama_tiny(layers: int = 4, *, mlp: int = 128) -> LlamaConfig:
    """Shape for a trial of a benchmark."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def mixture(layers: int) -> MixtralConfig:
    """Mixture of eight experts, two for each token; with Mixtral's 32 layers it has 2.85 billion parameters."""
    return MixtralConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def save_random(config: PretrainedConfig, folder: Path, *, sparse: bool = False) -> SavedModel:
    """Save a model with random weights. ``sparse``: every matrix of the layers is 2:4."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(one, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    tile = (torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) * _SCALE).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        _fill(parameter, tile, sparse=sparse and name.startswith(_LAYER))
    model.save_pretrained(folder, max_shard_size="100GB")
    config.architectures, config.dtype = model.config.architectures, torch.bfloat16
    config.save_pretrained(folder)
    first = folder / "model.safetensors"
    first = first.rename(folder / "model-00000.safetensors")
    tensors = load_file(first)
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith(_LAYER)}
    places = dict.fromkeys(tensors, first.name)
    for index in range(1, config.num_hidden_layers):
        shard = folder / f"model-{index:05}.safetensors"
        values = {name.replace(_LAYER, f"model.layers.{index}."): _other(layer[name], index) for name in layer}
        save_file(values, shard, metadata={"format": "pt"})
        places |= dict.fromkeys(values, shard.name)
    layer_bytes = sum(tensor.nbytes for tensor in layer.values())
    size = sum(tensor.nbytes for tensor in tensors.values()) + (config.num_hidden_layers - 1) * layer_bytes
    index_file = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return SavedModel(folder, size, layer_bytes, config)


def _fill(parameter: nn.Parameter, tile: Tensor, *, sparse: bool) -> None:
    """Fill a matrix with repeated random values, or a vector, which scales a norm, with ones."""
    if parameter.ndim == 1:
        parameter.data.fill_(1.0)
        return
    flat = parameter.data.view(-1)
    for start in range(0, len(flat), len(tile)):
        flat[start : start + len(tile)] = tile[: len(flat) - start]
    if sparse:
        flat.view(-1, 4)[:, ::2] = 0


def _other(tensor: Tensor, layer: int) -> Tensor:
    """Return the values of layer 0 in another order, which keeps groups of four; norms are as they were."""
    return tensor if tensor.ndim == 1 else tensor.view(-1, 4).roll(1009 * layer, 0).view(tensor.shape)
