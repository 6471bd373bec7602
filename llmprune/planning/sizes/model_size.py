"""Measure a model that may be without weights: parameters, bytes in its files, key-value cache of a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.anatomy.kept_results import KeptResults, config_key
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.layer_patterns import first_like_each
from llmprune.anatomy.meta_model import find_layers, quiet_transformers, text_config
from llmprune.checkpoint.file_names import Dtypes
from llmprune.checkpoint.stored_dtypes import stored_bytes
from llmprune.results.figures.model_size import Size


def measure_size(model: PreTrainedModel, units: KeptSizes, *, stored: Dtypes) -> Size:
    """Return the sizes of a model that may be without weights. Tied tensors count once.

    ``units``: the model's own, which are reported as they are given, and the dense model's layers that it has.
    ``stored``: types of the tensors in the files, by their names in the dense model.
    """
    return Size(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=stored_bytes(model, stored, layers=units.layers),
        layers=len(find_layers(model)[1]),
        widths=dict(units.widths),
        experts=units.experts,
        kv_groups=units.kv_groups,
        hidden=text_config(model.config).hidden_size,
        kv_bytes_per_token=_cache_bytes_per_token(model),
    )


def _cache_bytes_per_token(model: PreTrainedModel) -> int | None:
    """Return the bytes of one token in the key-value cache; None where they cannot be counted."""
    by_layer = cache_bytes_by_layer(model)
    return None if by_layer is None else sum(by_layer)


_CACHES = KeptResults[tuple[int, ...] | None]()


def cache_bytes_by_layer(model: PreTrainedModel) -> tuple[int, ...] | None:
    """Return the bytes of one token in each layer of the key-value cache, from forward passes without weights.

    None if these fail. May move the buffers of a model on the meta device there too.
    """
    return _CACHES.get((type(model), model.dtype, config_key(model.config)), lambda: _count_cache(model))


def _count_cache(model: PreTrainedModel) -> tuple[int, ...] | None:
    try:
        with quiet_transformers(), torch.device("meta"):
            if all(parameter.is_meta for parameter in model.parameters()):
                shapes = model.to("meta")  # only buffers are moved, which is cheaper than building the model again
            else:
                shapes = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
            before, after = (_cache_bytes(shapes, length) for length in (2, 3))
    except Exception:  # some models cannot run without weights: they get no such figure
        return None
    return tuple(more - less for less, more in zip(before, after, strict=True))


@torch.no_grad()
def _cache_bytes(shapes: PreTrainedModel, length: int) -> list[int]:
    """Return the bytes of the cache after ``length`` tokens, by layer. Of layers alike only the first one runs."""
    first = first_like_each(shapes)
    with _repeated_outputs(find_layers(shapes)[1], first):
        layers = _run(shapes, length)
    if len(layers) > len(first):  # a cache that has another number of layers than the model
        first, layers = tuple(range(len(layers))), _run(shapes, length)
    sizes = [
        sum(
            value.numel() * value.itemsize
            for value in vars(layer).values()
            if isinstance(value, torch.Tensor) and value.ndim > 1
        )
        for layer in layers
    ]
    return [sizes[index] for index in first]


def _run(shapes: PreTrainedModel, length: int) -> Sequence[object]:
    """Return the layers of the key-value cache after ``length`` tokens."""
    layers: Sequence[object] = shapes(
        input_ids=torch.ones(1, length, dtype=torch.long), use_cache=True
    ).past_key_values.layers
    return layers


@contextmanager
def _repeated_outputs(layers: nn.ModuleList, first: Sequence[int]) -> Iterator[None]:
    """Let each layer return what the first layer like it returned, which on the meta device is only a shape."""
    outputs: dict[int, Any] = {}

    def make(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run_or_repeat(*args: Any, **kwargs: Any) -> Any:
            if first[index] == index:
                outputs[index] = forward(*args, **kwargs)
            return outputs[first[index]]

        return run_or_repeat

    try:
        for index, layer in enumerate(layers):
            layer.forward = make(index, layer.forward)
        yield
    finally:
        for layer in layers:
            del layer.forward
