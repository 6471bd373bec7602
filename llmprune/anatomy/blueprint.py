"""Models without weights: shapes from a config alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from llmprune.errors import ModelError

Config: TypeAlias = PretrainedConfig  # transformers' own name for it is about to change


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide what transformers says while a model is only being measured."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def build_blueprint(
    config: Config, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of this config with parameters on the meta device and real buffers.

    Raises ModelError where the config is not that of a causal decoder.
    """
    config = copy.deepcopy(config)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        if "Unrecognized configuration class" not in str(error):
            raise ModelError(
                f"a model of type {config.model_type!r} cannot be built from its config "
                f"({type(error).__name__}: {error}); correct its config.json"
            ) from error
        raise ModelError(
            f"a model of type {config.model_type!r} is not a causal decoder (transformers has no "
            "AutoModelForCausalLM for it); llmprune prunes decoder-only language models"
        ) from error
    model.tie_weights()  # making parameters empty gave each tied one a copy of its own
    return model.eval()


def text_config(config: Config) -> Config:
    """The part of a config that describes the text decoder; the config itself where there is one part."""
    return config.get_text_config(decoder=True)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: of the lists of the right length the one with the most parameters."""
    count = getattr(text_config(model.config), "num_hidden_layers", None)
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count
    ]
    if not lists:
        raise ModelError(
            f"no list of {count} decoder layers was found in a {type(model).__name__}; "
            "llmprune prunes models whose layers are one ModuleList of num_hidden_layers"
        )
    _, path, layers = max(lists, key=lambda entry: entry[0])
    return path, layers


def materialise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter that lies on the meta device small random float32 values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                value = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
                setattr(owner, name, nn.Parameter(value, requires_grad=False))
