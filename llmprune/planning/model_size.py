"""Measure a model that may be without weights: parameters, bytes in its files, key-value cache of a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.anatomy.meta_model import find_layers, quiet_transformers
from llmprune.checkpoint.stored_dtypes import Dtypes, stored_bytes
from llmprune.results.report_schema import Size


def measure_size(
    model: PreTrainedModel,
    widths: dict[str, int],
    *,
    experts: int | None,
    kv_groups: int | None = None,
    stored: Dtypes,
    layers: Sequence[int] | None = None,
) -> Size:
    """Return the sizes of a model that may be without weights. Tied tensors count once.

    ``widths``, ``experts``, ``kv_groups``: the model's own, which are reported as they are given. ``stored``: types of
    the tensors in the files, by their names in the dense model; ``layers``: the dense model's layers that the model
    has, None for all.
    """
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=stored_bytes(model, stored, layers=layers),
        layers=len(find_layers(model)[1]),
        widths=widths,
        experts=experts,
        kv_groups=kv_groups,
        kv_bytes_per_token=_cache_bytes_per_token(model),
    )


def _cache_bytes_per_token(model: PreTrainedModel) -> int | None:
    """Return the bytes of one token in the key-value cache, from forward passes without weights; None if they fail."""
    try:
        with quiet_transformers(), torch.device("meta"):
            if all(parameter.is_meta for parameter in model.parameters()):
                shapes = model.to("meta")  # only buffers are moved, which is cheaper than building the model again
            else:
                shapes = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
            sizes = [_cache_bytes(shapes, length) for length in (2, 3)]
    except Exception:  # some models cannot run without weights: they get no such figure
        return None
    return sizes[1] - sizes[0]


@torch.no_grad()
def _cache_bytes(shapes: PreTrainedModel, length: int) -> int:
    cache = shapes(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values
    return sum(
        value.numel() * value.itemsize
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor) and value.ndim > 1
    )
