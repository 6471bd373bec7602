"""Build models without weights, on the meta device, from a config alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from llmprune.anatomy.known_refusals import refused_model
from llmprune.anatomy.model_kind import describe_kind
from llmprune.common.errors import ModelError

Config: TypeAlias = PretrainedConfig  # transformers' own name for it is about to change

_LARGE = 2**22  # elements of a stack of matrices; no model has such a buffer
_PATHS: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # of the decoder layers that were found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide warnings of transformers while the context lasts."""
    logger = logging.getLogger("transformers")
    before = logger.level
    if before == logging.ERROR:  # by an outer context: to set a level empties the caches of all loggers
        yield
        return
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def build_meta_model(
    config: Config, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model of a config, with parameters on the meta device and real buffers, in evaluation mode.

    Raises ModelError where the config is not that of a causal decoder, is refused, or cannot be built.
    """
    if config.is_encoder_decoder:
        raise ModelError(
            f"a model of type {config.model_type!r} is not a causal decoder but "
            f"{describe_kind(config.model_type, encodes=True)}; llmprune prunes decoder-only language models"
        )
    reason = refused_model(config)
    if reason:
        raise ModelError(f"a model of type {config.model_type!r} is not pruned: {reason}")
    config = copy.deepcopy(config)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights(), _StacksOnMeta():
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **options)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        if "Unrecognized configuration class" not in str(error):
            raise ModelError(
                f"a model of type {config.model_type!r} cannot be built from its config "
                f"({type(error).__name__}: {error}); correct its config.json"
            ) from error
        raise ModelError(
            f"a model of type {config.model_type!r} is not a causal decoder but {describe_kind(config.model_type)}; "
            "llmprune prunes decoder-only language models"
        ) from error
    model.tie_weights()  # on the meta device, each tied parameter has become a separate one
    return model.eval()


class _StacksOnMeta(TorchFunctionMode):
    """Mode that makes large stacks of matrices on the meta device: the experts of one layer can take 30 GB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:  # noqa: PLR0917 - torch calls it
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros) and "device" not in kwargs:
            sizes = args[0] if args and not isinstance(args[0], int) else args
            sizes = kwargs.get("size", sizes)
            if len(sizes) == 3 and math.prod(sizes) > _LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def auto_class(config: Config) -> Any:
    """Return the auto class whose model has every part of a config: text alone, or text and images."""
    only_text = text_config(config) is config and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not only_text and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def text_config(config: Config) -> Config:
    """Return the part of a config that describes the text decoder; the config itself where there is one part."""
    return config.get_text_config(decoder=True)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return path and list of the decoder layers: of the lists of the right length, the one with most parameters.

    Raises ModelError where there is none, or where its layers share weights.
    """
    count = getattr(text_config(model.config), "num_hidden_layers", None)
    known = _PATHS.get(model)
    if known is not None:
        layers = model.get_submodule(known)
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return known, layers
    path, layers = _search_layers(model, count)
    _require_own_weights(model, path, layers=layers)
    _PATHS[model] = path
    return path, layers


def _search_layers(model: PreTrainedModel, count: int | None) -> tuple[str, nn.ModuleList]:
    prefix, decoder = _text_decoder(model)
    lists = [
        (path, module)
        for path, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and len(module) == count and count
    ]
    if not lists:
        raise ModelError(
            f"no list of {count or 'num_hidden_layers'} decoder layers was found in a {type(model).__name__}; "
            "llmprune prunes models whose layers are one ModuleList of num_hidden_layers"
        )
    return max(lists, key=lambda one: sum(parameter.numel() for parameter in one[1].parameters()))


def _require_own_weights(model: PreTrainedModel, path: str, *, layers: nn.ModuleList) -> None:
    names = [name for name, _ in layers.named_parameters(remove_duplicate=False)]
    own = {name for name, _ in layers.named_parameters()}
    shared = next((name for name in names if name not in own), None)
    if shared is not None:
        raise ModelError(
            f"layers of a {type(model).__name__} share weights ({path}.{shared}), so none can be changed or removed "
            "alone; take a model whose layers do not share weights"
        )


def _text_decoder(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Return path and module of the part that the text config describes; the model itself where there is one part."""
    decoder = None if text_config(model.config) is model.config else model.get_decoder()
    paths = (path for path, module in model.named_modules() if module is decoder)
    return next(((path, model.get_submodule(path)) for path in paths), ("", model))


def fill_with_noise(module: nn.Module, seed: int = 0, *, without: Collection[nn.Module | None] = ()) -> None:
    """Give every parameter on the meta device small random float32 values, in place.

    ``without``: modules whose own parameters are left on the meta device.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        if owner in without:
            continue
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                value = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
                setattr(owner, name, nn.Parameter(value, requires_grad=False))
