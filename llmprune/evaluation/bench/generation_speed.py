"""Generation speed of dense and pruned model, timed alternately so that drift of the machine affects both.

Where both do not fit in memory together, they are timed one after the other.

Shapes: B prompts, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, TypeAlias

from llmprune.common.devices import device_names, input_device
from llmprune.common.errors import EvaluationError, RecipeError
from llmprune.evaluation.decoding import Greedy, generate
from llmprune.evaluation.whole_model import WholeModel
from llmprune.recipe.evaluation import Speed
from llmprune.results.figures.evaluation import SpeedFigures

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel


Clock: TypeAlias = "Callable[[], float]"  # seconds


@dataclass(frozen=True)
class Timing:
    """Duration of one generation in seconds."""

    first: float  # from the call to the first new token, which includes the prefill
    rest: float  # from the first to the last new token


def require_positions(settings: Speed, config: PretrainedConfig, *, section: str = "evaluation.speed") -> None:
    """Raise RecipeError if prompt and new tokens exceed the model's positions. ``section``: with the settings."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and settings.prompt_tokens + settings.new_tokens > positions:
        raise RecipeError(
            f"{section}: prompt_tokens {settings.prompt_tokens} + new_tokens {settings.new_tokens} "
            f"exceed the model's {positions} positions; shorten one of them"
        )


def clock_of_models_in_memory(device: torch.device) -> Clock:
    """Return the clock for models whose weights are in memory: that of the wall, or this thread's processor time.

    With one thread on a CPU the processor time is as long, and leaves out the time that other programs take.
    """
    import torch

    return thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else perf_counter


def compare_speed(
    dense: WholeModel, pruned: WholeModel, *, settings: Speed, together: bool, clock: Clock = perf_counter
) -> SpeedFigures:
    """Time greedy generation after random prompts, in new tokens per second of prefill and decoding together.

    Each model has one warm-up run. ``together``: both fit in memory, and are timed alternately; otherwise the pruned
    model is timed and released before the dense one is loaded. Raises RecipeError if a model has too few positions.
    """
    if together:
        (before, after), devices = _time((dense, pruned), settings, clock=clock)
    else:  # the pruned model is loaded already
        (after,), devices = _time((pruned,), settings, clock=clock)
        pruned.release()
        (before,), others = _time((dense,), settings, clock=clock)
        devices = " and ".join(sorted({devices, others}))
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    return SpeedFigures(
        dense=median(before),
        pruned=median(after),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        batch_size=settings.batch_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        device=devices,
        alternating=together,
    )


def _time(wholes: tuple[WholeModel, ...], settings: Speed, *, clock: Clock) -> tuple[list[list[float]], str]:
    """Return the rates of models that take turns after a warm-up of each, and the names of their devices.

    Rates are new tokens per second.
    """
    models = tuple(whole.get() for whole in wholes)
    for model in models:
        require_positions(settings, model.config)
    prompts_BL = random_prompts(models, settings.batch_size, length=settings.prompt_tokens)
    for model in models:
        time_generation(model, prompts_BL, new_tokens=settings.new_tokens)
    rounds = [
        [_rate(model, prompts_BL, new_tokens=settings.new_tokens, clock=clock) for model in models]
        for _ in range(settings.repeats)
    ]
    return [list(rates) for rates in zip(*rounds, strict=True)], device_names(models)


def random_prompts(models: tuple[PreTrainedModel, ...], batch_size: int, *, length: int) -> Tensor:
    """Return random token ids [B, L] within the vocabulary of every model, the same in every call."""
    import torch

    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    return torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))


def time_generation(
    model: PreTrainedModel,
    prompts_BL: Tensor,
    *,
    new_tokens: int,
    static_cache: bool = False,
    clock: Clock = perf_counter,
) -> Timing:
    """Time one greedy generation of exactly ``new_tokens`` tokens after each prompt.

    With ``static_cache`` transformers preallocates the key-value cache, and compiles the decoding on CUDA. Raises
    EvaluationError if the model generates fewer tokens.
    """
    device = input_device(model)
    inputs_BL = prompts_BL.to(device)
    ticks = _Ticks(clock)
    _synchronize(device)
    start = clock()
    settings = Greedy(new_tokens, static_cache=static_cache)
    output_BL = generate(model, inputs_BL, settings=settings, streamer=ticks)
    _synchronize(device)
    generated = output_BL.shape[1] - prompts_BL.shape[1]
    if generated != new_tokens:
        raise EvaluationError(
            f"{type(model).__name__} generated {generated} tokens instead of {new_tokens}, so its speed cannot be "
            "measured; remove evaluation.speed from the recipe"
        )
    first = ticks.seconds[1]  # 0 is the prompt itself
    return Timing(first - start, ticks.seconds[-1] - first)


class _Ticks:
    """Streamer that records the time of each token. Tokens arrive on the CPU, so the device has finished by then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: list[float] = []

    def put(self, value: Any) -> None:
        self.seconds.append(self._clock())

    def end(self) -> None:
        """Do nothing; transformers calls it after the last token."""


def _rate(model: PreTrainedModel, prompts_BL: Tensor, *, new_tokens: int, clock: Clock) -> float:
    """Return new tokens per second over all prompts."""
    timing = time_generation(model, prompts_BL, new_tokens=new_tokens, clock=clock)
    return float(prompts_BL.shape[0] * new_tokens / (timing.first + timing.rest))


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
