"""Models of the shapes of one dense model, with random weights of real sizes, for measurements of speed.

Weights of the same name and size are shared between the models, so that the dense model and narrower ones fit in
memory together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.anatomy.vocabulary import some_tokens, vocabulary_config
from llmprune.checkpoint.model_memory import memory_for_models
from llmprune.common.errors import ModelError
from llmprune.common.schema import format_size
from llmprune.cut.apply import cut_config
from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.speed_subject import SpeedSubject

Key = tuple[str, torch.Size]  # name in the dense model, and size
Weights = dict[Key, nn.Parameter]


def random_models(subject: SpeedSubject, shapes: Sequence[Shape]) -> list[PreTrainedModel]:
    """Return models with random weights on the subject's device. Layers are removed from the middle.

    Raises ModelError where a config cannot express a shape, or where the models exceed the memory for weights.
    """
    path, total = subject.anatomy.layers_path, subject.anatomy.num_layers
    kept = [without_middle(total, kept=shape.layers) for shape in shapes]
    models = [meta_model(subject, shape, layers=layers) for shape, layers in zip(shapes, kept, strict=True)]
    wanted: Weights = {}
    for model, layers in zip(models, kept, strict=True):
        wanted = {key: weight for _, _, key, weight in _weights(model, path, layers=layers)} | wanted
    _require_memory(subject, sum(weight.numel() * weight.itemsize for weight in wanted.values()))
    generator = torch.Generator(subject.device).manual_seed(0)
    shared = {key: _random(weight, generator) for key, weight in wanted.items()}
    for model, layers in zip(models, kept, strict=True):
        for owner, name, key, _ in list(_weights(model, path, layers=layers)):
            setattr(owner, name, shared[key])
        model.to(subject.device)  # buffers, which have their values already
    return models


def without_middle(count: int, *, kept: int) -> tuple[int, ...]:
    """Return the indices of ``kept`` of ``count`` layers; those left out are consecutive, in the middle."""
    first = (kept + 1) // 2
    return (*range(first), *range(count - (kept - first), count))


def meta_model(subject: SpeedSubject, shape: Shape, *, layers: Sequence[int]) -> PreTrainedModel:
    """Return the model of a shape without weights. ``layers``: of the dense model, that it keeps."""
    kept = KeptSizes(tuple(layers), shape.neurons, shape.experts, shape.kv_groups)
    config = cut_config(subject.config, subject.anatomy, kept=kept)
    if shape.tokens is not None:
        config = vocabulary_config(config, some_tokens(config, shape.tokens))
    return build_meta_model(config, subject.dtype, trust_remote_code=subject.source.trust_remote_code)


def _weights(
    model: PreTrainedModel, path: str, *, layers: Sequence[int]
) -> Iterator[tuple[nn.Module, str, Key, nn.Parameter]]:
    """Yield module, name in it, key and value of every parameter; tied parameters have the key of the first of them."""
    keys: dict[int, Key] = {}
    for place, owner in model.named_modules():
        for name, weight in owner.named_parameters(recurse=False):
            key = (_dense_name(f"{place}.{name}", path, layers=layers), weight.shape)
            yield owner, name, keys.setdefault(id(weight), key), weight


def _dense_name(name: str, path: str, *, layers: Sequence[int]) -> str:
    """Return a parameter's name with the index that its layer has in the dense model."""
    if not name.startswith(f"{path}."):
        return name
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{layers[int(index)]}.{rest}"


def _random(weight: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    """Return a parameter of this size: ones for a vector, which scales a norm, else normal values / √inputs."""
    value = torch.ones(weight.shape, dtype=weight.dtype, device=generator.device)
    if weight.ndim > 1:
        value.normal_(std=1 / math.sqrt(weight.shape[-1]), generator=generator)
    return nn.Parameter(value, requires_grad=False)


def _require_memory(subject: SpeedSubject, needed: int) -> None:
    """Raise ModelError where weights of ``needed`` bytes do not fit."""
    free = memory_for_models(subject.source)
    if needed > free:
        raise ModelError(
            f"{subject.source.id}: the models whose speed is measured need {format_size(needed)} together, and "
            f"{format_size(free)} are free for weights; end other programs, or measure on a machine with more memory"
        )
