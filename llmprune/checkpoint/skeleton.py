"""Skeletons: models with all tensors but those of the decoder layers, which get theirs when they are visited."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import Config, build_meta_model, find_layers
from llmprune.layerwise.decoder import Tensors


def build_skeleton(
    config: Config,
    dense: PreTrainedModel,
    *,
    device: torch.device,
    cut: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> PreTrainedModel:
    """Build the skeleton of a config on a device, with the tensors outside the layers of another model.

    ``dense``: a whole model or a skeleton, with which the result shares these tensors. ``cut``: what is kept of them.
    """
    runs_own_code = not type(dense).__module__.startswith("transformers.")
    skeleton = build_meta_model(config, dense.dtype, trust_remote_code=runs_own_code)
    path, _ = find_layers(dense)
    tied = dense.all_tied_weights_keys
    tensors = cut({name: value for name, value in tensors_of(dense, skip=path).items() if name not in tied})
    fill_rest(skeleton, tensors, device=device, missing=tied)
    skeleton.generation_config = dense.generation_config
    skeleton.config.name_or_path = dense.config.name_or_path
    conversions = getattr(dense, "_weight_conversions", None)
    if conversions is not None:
        skeleton._weight_conversions = conversions  # from the model's tensors to those of its files, for saving
    return skeleton


def fill_rest(skeleton: PreTrainedModel, tensors: Tensors, *, device: torch.device, missing: Collection[str]) -> None:
    """Give a model without weights all tensors outside its layers, on a device, and tie those that are tied.

    ``missing``: names of parameters and buffers that no file has: tied ones, and those that transformers initialises.
    """
    path, _ = find_layers(skeleton)
    skeleton.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, strict=False, assign=True)
    skeleton.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    for module_path, module in skeleton.named_modules():
        if f"{module_path}.".startswith(f"{path}."):
            continue
        _initialise_missing(skeleton, module, device=device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    skeleton.requires_grad_(False)


def _initialise_missing(model: PreTrainedModel, module: nn.Module, *, device: torch.device) -> None:
    """Initialise parameters that no file has, as transformers does where a model allows them to be missing."""
    parameters = dict(module.named_parameters(recurse=False))
    if not any(value.is_meta for value in parameters.values()):
        return
    for name, value in parameters.items():
        if value.is_meta:
            setattr(module, name, nn.Parameter(torch.empty_like(value, device=device)))
        else:
            value.__dict__["_is_hf_initialized"] = True  # transformers leaves it as it is
    model._init_weights(module)


def tensors_of(module: nn.Module, skip: str | None = None) -> Tensors:
    """Return a module's parameters and persistent buffers by name, loaded where they are offloaded.

    ``skip``: path of a module inside whose tensors are left out.
    """
    tensors: Tensors = {}
    for path, part in module.named_modules():
        if skip is not None and f"{path}.".startswith(f"{skip}."):
            continue
        dot = f"{path}." if path else ""
        with align_module_device(part):
            for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                if name not in part._non_persistent_buffers_set:
                    tensors[dot + name] = value.detach()
    return tensors
