"""Greedy decoding and sampling that ignore the model's own generation settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.common.devices import input_device

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Greedy:
    """Settings of a greedy generation."""

    new_tokens: int  # per prompt; fewer only where an end token comes first
    end_tokens: frozenset[int] = frozenset()  # without any, exactly new_tokens are generated
    static_cache: bool = False  # preallocate the key-value cache; transformers then compiles the decoding on CUDA


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation that draws from the model's own distribution, by default without an end."""

    new_tokens: int  # per prompt; fewer only where an end token comes first
    end_tokens: frozenset[int] = frozenset()
    static_cache: bool = False
    temperature: float = 1.0
    least_tokens: int = 0  # before an end token


def generate(
    model: PreTrainedModel,
    prompts_BP: Tensor,
    *,
    settings: Greedy | Sampling,
    mask_BP: Tensor | None = None,
    streamer: Any = None,
) -> Tensor:
    """Return prompts and new tokens [B, P + new] on the model's device, padded after the end token.

    ``mask_BP``: 0 for the padding before shorter prompts, else 1; None: no padding.
    ``streamer`` receives the prompts and each step's tokens on the CPU, by its methods ``put`` and ``end``.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=settings.new_tokens,
        **_choice_of_tokens(settings),
        remove_invalid_values=isinstance(settings, Sampling),  # drawing from NaN would break a GPU's context
        num_beams=1,
        use_cache=True,
        cache_implementation="static" if settings.static_cache else None,
        eos_token_id=sorted(settings.end_tokens) or None,
        pad_token_id=min(settings.end_tokens, default=0),
    )
    inputs_BP = prompts_BP.to(input_device(model))
    mask_BP = torch.ones_like(inputs_BP) if mask_BP is None else mask_BP.to(inputs_BP.device)
    with torch.no_grad(), _default_generation_settings(model):
        output: Tensor = model.generate(inputs_BP, attention_mask=mask_BP, generation_config=config, streamer=streamer)
    return output


def _choice_of_tokens(settings: Greedy | Sampling) -> dict[str, Any]:
    """Return how each token is chosen, and the least number of them."""
    if isinstance(settings, Greedy):
        return {"do_sample": False, "min_new_tokens": None if settings.end_tokens else settings.new_tokens}
    least = settings.least_tokens or None if settings.end_tokens else settings.new_tokens
    return {"do_sample": True, "top_k": 0, "temperature": settings.temperature, "min_new_tokens": least}


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids of the tokens that end a text."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return frozenset() if ids is None else frozenset({ids} if isinstance(ids, int) else ids)


@contextmanager
def _default_generation_settings(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation settings by the defaults while the context is open.

    ``generate`` takes from them what its caller leaves open: penalties, beams, an early end, or a search strategy that
    needs code from the hub.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
