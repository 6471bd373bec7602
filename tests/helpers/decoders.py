"""Decoders over models in memory; a run opens them over files."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.checkpoint.skeleton import build_skeleton, tensors_of
from llmprune.common.distributed import local_device
from llmprune.layerwise.decoder import Decoder, LayerPlacement


def dense_decoder(model: PreTrainedModel) -> Decoder:
    """Make a decoder over a loaded model, whose layers stay on their devices until a layer-wise pass needs them."""
    _, layers = find_layers(model)
    device = _running_device(model.get_input_embeddings())
    devices = tuple(map(_running_device, layers))
    return Decoder(
        build_skeleton(model.config, model, device=device),
        lambda index: tensors_of(layers[index]),
        placement=LayerPlacement(devices),
        quick=True,
    )


def _running_device(module: nn.Module) -> torch.device:
    """Return the device that a module computes on: its own GPU, or for offloaded weights the process's device."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return local_device() if device.type in ("cpu", "meta") else device
