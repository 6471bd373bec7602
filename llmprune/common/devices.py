"""Devices of models, and their names for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's inputs belong on; an offloaded model takes and returns tensors on the CPU."""
    import torch

    return torch.device("cpu") if model.device.type == "meta" else model.device


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or ``CPU, 2 threads``."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def device_names(models: tuple[PreTrainedModel, ...]) -> str:
    """Return the names of the models' devices, each once, joined by ``and``."""
    return " and ".join(sorted({device_name(input_device(model)) for model in models}))
