"""Memory that whole models take, and memory that is free for them where the recipe's device map puts them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llmprune.checkpoint.loading import compute_dtype, load_config
from llmprune.checkpoint.location import bytes_on_disk, headers_of
from llmprune.checkpoint.placement import FOR_WEIGHTS
from llmprune.checkpoint.weight_headers import DTYPES
from llmprune.common.distributed import local_device, world_size
from llmprune.common.machine_memory import free_memory
from llmprune.recipe.model import ModelSource


def fit_together(sources: Sequence[ModelSource]) -> bool:
    """Check whether whole models, none of them loaded yet, fit in the memory of their devices together."""
    return sum(map(whole_model_bytes, sources)) <= min(map(room_for_models, sources))


def whole_model_bytes(source: ModelSource) -> int:
    """Return the bytes of a model's weights in the type that it is computed in. Raises ModelError, CheckpointError."""
    headers = headers_of(source)
    if not headers:
        return bytes_on_disk(source)
    dtype = compute_dtype(source, load_config(source), found=headers)
    return sum(
        math.prod(tensor.shape) * (dtype if tensor.floating else DTYPES.get(tensor.dtype, torch.uint8)).itemsize
        for tensor in headers.values()
    )


def room_for_models(source: ModelSource) -> int:
    """Return the free bytes for weights on the devices of a model: on GPUs where it is computed there, else of RAM.

    Of several processes each has one GPU. Limits of ``model.max_memory`` apply.
    """
    limits, gpus = source.max_memory, _gpus_of(source)
    if not gpus:
        free = free_memory()
        return int(FOR_WEIGHTS * (min(free, limits.get("cpu", free)) if limits else free))
    free_on = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}
    return int(FOR_WEIGHTS * sum(min(free, limits.get(gpu, 0)) if limits else free for gpu, free in free_on.items()))


def _gpus_of(source: ModelSource) -> list[int]:
    """Return the indices of the GPUs that a model may be placed on."""
    if not torch.cuda.is_available() or source.device_map == "cpu":
        return []
    if isinstance(source.device_map, dict):
        named = {torch.device(place) for place in source.device_map.values() if place not in ("cpu", "disk")}
        return sorted(device.index or 0 for device in named)
    return list(range(torch.cuda.device_count())) if world_size() == 1 else [local_device().index]
