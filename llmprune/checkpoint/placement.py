"""Placement of a model: the device that computes each layer, and the layers whose tensors stay on their device.

Layers that fit on no GPU are read from the files at every visit, whether the device map says CPU or disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import check_device_map, get_balanced_memory, get_max_memory
from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.common.distributed import local_device, processes_on_machine, rank, sum_over_processes, world_size
from llmprune.common.errors import RecipeError
from llmprune.common.machine_memory import free_memory
from llmprune.layerwise.decoder import LayerPlacement
from llmprune.recipe.model import ModelSource

FOR_WEIGHTS = 0.9  # share of free memory for whole models; the rest is for activations and the key-value cache
DeviceMap = Mapping[str, Any]  # path of a module to a GPU's number, "cpu" or "disk", as in accelerate


@dataclass(frozen=True)
class Placement:
    """Devices of a model's layers, and of its modules outside them."""

    layers: LayerPlacement
    rest: torch.device


def place(source: ModelSource, model: PreTrainedModel, *, working: Mapping[int, int] | None = None) -> Placement:
    """Place a model without weights by the recipe's device map.

    ``working``: bytes to leave free on each GPU for everything but resident weights. Raises RecipeError where the
    device map does not fit the model.
    """
    found = device_map_of(source, model, working=working) or {"": "cpu"}
    path, layers = find_layers(model)
    on_gpu = [_gpu_of(f"{path}.{index}", layer, devices=found) for index, layer in enumerate(layers)]
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return Placement(
        LayerPlacement(
            tuple(device or local_device() for device in on_gpu),
            frozenset(index for index, device in enumerate(on_gpu) if device is not None),
        ),
        rest=_gpu_of(name, embedding, devices=found) or local_device(),
    )


def device_map_of(
    source: ModelSource,
    model: PreTrainedModel,
    *,
    working: Mapping[int, int] | None = None,
    free: Mapping[int, int] | None = None,
) -> DeviceMap | None:
    """Return the device of every part of a model, which may be without weights; None where all is on the CPU.

    Of several processes each has one GPU, unless the recipe names devices itself. ``working``: as for ``place``.
    ``free``: free bytes of the GPUs, None for those that this process has. Raises RecipeError where the device map does
    not fit the model.
    """
    if isinstance(source.device_map, dict):
        try:
            check_device_map(model, source.device_map)
        except ValueError as error:
            raise RecipeError(f"model.device_map: {error}; name every part, or set it to auto") from error
        return source.device_map
    limits: dict[Any, int] | None
    if source.device_map == "cpu" or not torch.cuda.is_available():
        limits = _limit_of_ram(source, model)
        if limits is None:
            return None
    elif source.max_memory:
        limits = get_max_memory(dict(source.max_memory))
    else:
        limits = {**(free or _free_on_own_gpus()), "cpu": free_memory() // processes_on_machine()}
    limits = {place: max(0, size - (working or {}).get(place, 0)) for place, size in limits.items()}
    whole = sorted({*(model._no_split_modules or ()), *(type(layer).__name__ for layer in find_layers(model)[1])})
    balanced = get_balanced_memory(model, max_memory=limits, no_split_module_classes=whole)
    # offload_buffers does not change the map, only silences a warning about buffers that our layers bring along
    found: DeviceMap = infer_auto_device_map(
        model, max_memory=balanced, no_split_module_classes=whole, offload_buffers=True
    )
    return found


def device_map_of_whole(
    source: ModelSource, model: PreTrainedModel, *, free: Mapping[int, int] | None = None
) -> DeviceMap | None:
    """Return the device of every part of a model that is loaded whole, as ``device_map_of`` does.

    Where the recipe limits no memory, a part of every GPU is left for activations and the key-value cache. ``free``:
    as for ``device_map_of``.
    """
    if source.max_memory or not torch.cuda.is_available():
        return device_map_of(source, model)
    free = free or _free_on_own_gpus()
    working = {gpu: int(size * (1 - FOR_WEIGHTS)) for gpu, size in free.items()}
    return device_map_of(source, model, working=working, free=free)


def free_on_all_gpus() -> dict[int, int]:
    """Return the free bytes of the GPUs of this machine's processes, by number. Every process of the run calls this."""
    if world_size() == 1 or local_device().type != "cuda":
        return _free_on_own_gpus() if torch.cuda.is_available() else {}
    gpu = local_device().index
    free_P = torch.zeros(world_size(), dtype=torch.int64)
    free_P[rank()] = _free_on(gpu)
    sum_over_processes([free_P])
    first = rank() - gpu  # of the processes on this machine
    return dict(enumerate(free_P[first : first + processes_on_machine()].tolist()))


def _free_on_own_gpus() -> dict[int, int]:
    """Return the free bytes of the GPUs of this process: asking those of others would take memory on them."""
    gpus = range(torch.cuda.device_count()) if world_size() == 1 else [local_device().index]
    return {gpu: _free_on(gpu) for gpu in gpus}


def _free_on(gpu: int) -> int:
    return int(torch.cuda.mem_get_info(gpu)[0])


def gpus_of(source: ModelSource) -> list[int]:
    """Return the numbers of the GPUs that a model's layers may stay on: those of the device map, else all.

    Of several processes each has one GPU, unless the recipe names devices itself. Absent ones that it names are left
    out: the plan reports them.
    """
    if source.device_map == "cpu" or not torch.cuda.is_available():
        return []
    if isinstance(source.device_map, dict):
        present = {name: gpu for gpu in range(torch.cuda.device_count()) for name in (gpu, f"cuda:{gpu}")} | {"cuda": 0}
        return sorted({present[device] for device in source.device_map.values() if device in present})
    return list(range(torch.cuda.device_count())) if world_size() == 1 else [local_device().index or 0]


def _limit_of_ram(source: ModelSource, model: PreTrainedModel) -> dict[Any, int] | None:
    """Return the limit of RAM for a model on the CPU, beyond which it is on disk; None where it needs none."""
    if source.max_memory and "cpu" in source.max_memory:
        return {"cpu": source.max_memory["cpu"]}
    size, free = sum(each.numel() * each.itemsize for each in model.parameters()), int(free_memory() * FOR_WEIGHTS)
    return None if size <= free else {"cpu": free}


def _gpu_of(path: str, module: nn.Module, *, devices: DeviceMap) -> torch.device | None:
    """Return the GPU of a module's first parameter; None where that is on the CPU or on disk."""
    first = next((name for name, _ in module.named_parameters()), "")
    parts = [*path.split("."), *first.split(".")]
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    named = next((devices[prefix] for prefix in prefixes if prefix in devices), devices.get("", "cpu"))
    if named in ("cpu", "disk"):
        return None
    device = torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
    return local_device() if device.type == "cuda" and device.index is None else device
