"""Memory of whole models: what they take, and what is free on the devices of the recipe's device map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.loading import compute_dtype, load_config
from llmprune.checkpoint.location import bytes_on_disk, headers_of, quantization_of_source
from llmprune.checkpoint.placement import FOR_WEIGHTS, gpus_of
from llmprune.checkpoint.weight_headers import DTYPES
from llmprune.common.machine_memory import free_memory
from llmprune.recipe.model import ModelSource


def fit_together(sources: Sequence[ModelSource]) -> bool:
    """Check whether whole models, none of them loaded yet, fit in the memory of their devices together."""
    return sum(map(whole_model_bytes, sources)) <= min(map(memory_for_models, sources))


def fits_in_memory(source: ModelSource) -> bool:
    """Check whether a whole model, not loaded yet, fits in the memory of its devices and RAM together."""
    ram = int(FOR_WEIGHTS * free_memory()) if gpus_of(source) else 0  # without GPUs RAM is the device
    return whole_model_bytes(source) <= memory_for_models(source) + ram


def whole_model_bytes(source: ModelSource) -> int:
    """Return the bytes of a model's weights in the type that it is computed in. Raises ModelError, CheckpointError."""
    headers = headers_of(source)
    if not headers:
        return bytes_on_disk(source)
    config = load_config(source)
    dtype = compute_dtype(source, config, found=headers)
    if quantization_of_source(source) is not None:
        model = build_meta_model(config, dtype, trust_remote_code=source.trust_remote_code)
        return sum(parameter.nbytes for parameter in model.parameters())
    return sum(
        math.prod(tensor.shape) * (dtype if tensor.floating else DTYPES.get(tensor.dtype, torch.uint8)).itemsize
        for tensor in headers.values()
    )


def memory_for_models(source: ModelSource) -> int:
    """Return the free bytes for weights on the devices of a model: on GPUs where it is computed there, else of RAM.

    Of several processes each has one GPU. Limits of ``model.max_memory`` apply.
    """
    limits, gpus = source.max_memory, gpus_of(source)
    if not gpus:
        free = free_memory()
        return int(FOR_WEIGHTS * (min(free, limits.get("cpu", free)) if limits else free))
    free_on = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in gpus}
    return int(FOR_WEIGHTS * sum(min(free, limits.get(gpu, 0)) if limits else free for gpu, free in free_on.items()))
