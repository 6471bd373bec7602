"""Generation speed of dense and pruned, timed in turn so that a machine's drift meets both.

Shapes: B prompts, L prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import EvaluationError, RecipeError
from llmprune.evaluation.decoding import default_settings
from llmprune.recipe.evaluation import Speed
from llmprune.results.evaluation_figures import SpeedFigures

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Timing:
    """Seconds of one generation."""

    first: float  # from the call to the first new token: the prompt goes through the model
    rest: float  # from there to the last new token


def require_positions(settings: Speed, config: PretrainedConfig) -> None:
    """Raise RecipeError where prompt and new tokens are more than the model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.prompt_tokens + settings.new_tokens > positions:
        raise RecipeError(
            f"evaluation.speed: prompt_tokens {settings.prompt_tokens} + new_tokens {settings.new_tokens} "
            f"exceed the model's {positions} positions; shorten one of them"
        )


def compare_speed(dense: PreTrainedModel, pruned: PreTrainedModel, *, settings: Speed) -> SpeedFigures:
    """Greedy generation after random prompts; tokens per second count new tokens over prefill and decoding.

    Each model warms up once. Raises RecipeError where the model has too few positions.
    """
    models = (dense, pruned)
    for model in models:
        require_positions(settings, model.config)
    prompts_BL = random_prompts(models, settings.batch_size, length=settings.prompt_tokens)
    for model in models:
        time_generation(model, prompts_BL, new_tokens=settings.new_tokens)
    pairs = [
        [_rate(model, prompts_BL, new_tokens=settings.new_tokens) for model in models] for _ in range(settings.repeats)
    ]
    ratios = [after / before for before, after in pairs]
    return SpeedFigures(
        dense=median(before for before, _ in pairs),
        pruned=median(after for _, after in pairs),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        batch_size=settings.batch_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        device=" and ".join(sorted({device_name(input_device(model)) for model in models})),
    )


def random_prompts(models: tuple[PreTrainedModel, ...], batch_size: int, *, length: int) -> Tensor:
    """Token ids [B, L] that all models know, the same every time."""
    import torch

    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    return torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))


def time_generation(
    model: PreTrainedModel, prompts_BL: Tensor, *, new_tokens: int, static_cache: bool = False
) -> Timing:
    """One greedy generation of exactly so many new tokens after each prompt.

    With ``static_cache`` transformers keeps keys and values in place, and on CUDA compiles the decoding.
    """
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        cache_implementation="static" if static_cache else None,
        pad_token_id=0,
    )
    device = input_device(model)
    inputs_BL = prompts_BL.to(device)
    mask_BL = torch.ones_like(inputs_BL)
    clock = _Clock()
    _synchronize(device)
    start = perf_counter()
    with default_settings(model):
        output_BL = model.generate(inputs_BL, attention_mask=mask_BL, generation_config=greedy, streamer=clock)
    _synchronize(device)
    generated = output_BL.shape[1] - prompts_BL.shape[1]
    if generated != new_tokens:
        raise EvaluationError(
            f"{type(model).__name__} generated {generated} tokens where {new_tokens} were asked for, so its speed "
            "cannot be measured; leave evaluation.speed out of the recipe"
        )
    first = clock.ticks[1]  # 0 is the prompt itself
    return Timing(first - start, clock.ticks[-1] - first)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong; an offloaded model takes and gives its tensors on the CPU."""
    import torch

    return torch.device("cpu") if model.device.type == "meta" else model.device


def device_name(device: torch.device) -> str:
    """The hardware in words."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


class _Clock:
    """Notes when each token comes out: transformers hands them over on the CPU, so the device is done then."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Any) -> None:
        self.ticks.append(perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def _rate(model: PreTrainedModel, prompts_BL: Tensor, *, new_tokens: int) -> float:
    """New tokens per second, all prompts together."""
    timing = time_generation(model, prompts_BL, new_tokens=new_tokens)
    return float(prompts_BL.shape[0] * new_tokens / (timing.first + timing.rest))


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
