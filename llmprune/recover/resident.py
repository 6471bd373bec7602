"""All layers of a decoder in memory, on one device, as the training needs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llmprune.layerwise.decoder import Decoder


def fill(decoder: Decoder, dtype: torch.dtype, *, device: torch.device, prepare: Callable[[nn.Module], None]) -> None:
    """Give a decoder's skeleton all of its weights, in this type and on this device.

    ``prepare`` gets each layer when it has its own.
    """
    _move(decoder.skeleton, dtype, device=device, skip=decoder.layers_path)
    for index, layer in enumerate(decoder.layers):
        layer.load_state_dict(decoder.tensors(index), assign=True)
        _move(layer, dtype, device=device)
        prepare(layer)
    decoder.drop_held_and_next()


def _move(module: nn.Module, dtype: torch.dtype, *, device: torch.device, skip: str | None = None) -> None:
    """Give a module parameters of its own, in this type and on this device; parameters that it shares stay shared."""
    for path, owner in module.named_modules():
        if skip is not None and f"{path}.".startswith(f"{skip}."):
            continue
        for parameter in owner.parameters(recurse=False):
            if not parameter.is_meta:
                kept = dtype if parameter.is_floating_point() else parameter.dtype
                parameter.data = parameter.data.to(device, kept, copy=True)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.to(device))
