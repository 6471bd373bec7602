"""Speed and memory of two models, timed alternately over batch sizes and context lengths (``llmprune bench``).

All figures are measured except the energy, which is estimated from the sizes: each decoded token reads the weights once
from DRAM, at 640 pJ per 32-bit word (Horowitz, "Computing's energy problem", ISSCC 2014: 45 nm, LPDDR2). The estimate
compares two models; it does not describe the memory of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING

from llmprune.common.devices import device_names
from llmprune.common.errors import RecipeError
from llmprune.common.linalg.precision import dtype_name
from llmprune.common.process_memory import peak_memory, reset_peak, trim
from llmprune.common.progress import track
from llmprune.evaluation.bench.generation_speed import Timing, random_prompts, time_generation
from llmprune.results.figures.bench import BenchFigures, BenchPoint, BenchSize, Pair, Spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICOJOULES_PER_WORD = 640  # of 32 bits


@dataclass(frozen=True)
class BenchModel:
    """Model to be timed, with its name and size."""

    name: str
    model: PreTrainedModel
    size: BenchSize


@dataclass(frozen=True)
class BenchSettings:
    """Cases to be timed: every batch size with every context length."""

    batch_sizes: tuple[int, ...]
    contexts: tuple[int, ...]  # prompt tokens
    new_tokens: int
    repeats: int  # runs of each model, after one warm-up
    static_cache: bool = False


def run_bench(base: BenchModel, other: BenchModel, *, settings: BenchSettings) -> BenchFigures:
    """Time greedy generation of both models, alternating, after a warm-up of each.

    Raises RecipeError if context and new tokens exceed a model's positions.
    """
    models = base.model, other.model
    _require_positions(models, settings)
    cases = [(batch_size, context) for batch_size in settings.batch_sizes for context in settings.contexts]
    points = []
    for index in track(range(len(cases)), "bench"):
        batch_size, context = cases[index]
        points.append(_measure(models, settings, batch_size=batch_size, context=context))
    return BenchFigures(
        base=base.name,
        model=other.name,
        base_size=base.size,
        model_size=other.size,
        points=tuple(points),
        repeats=settings.repeats,
        new_tokens=settings.new_tokens,
        cache="static" if settings.static_cache else "dynamic",
        device=device_names(models),
        dtype=" and ".join(sorted({dtype_name(model.dtype) for model in models})),
    )


def decoded_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that one decoded token reads, at batch size one.

    These are all weights except an embedding table that is not also the output head, of which one row is read. All
    experts of a mixture are counted, so for mixtures this is an upper bound.
    """
    tensors = {id(parameter): parameter for parameter in model.parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is not None and (head is None or head.weight is not table.weight):
        tensors.pop(id(table.weight), None)
    return sum(parameter.numel() * parameter.itemsize for parameter in tensors.values())


def joules(read_bytes: int) -> float:
    """Estimate the DRAM energy of reading this many bytes."""
    return read_bytes / 4 * PICOJOULES_PER_WORD * 1e-12


def _require_positions(models: tuple[PreTrainedModel, ...], settings: BenchSettings) -> None:
    positions = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    least = min((count for count in positions if count), default=None)
    longest = max(settings.contexts)
    if least and longest + settings.new_tokens > least:
        raise RecipeError(
            f"--contexts: {longest} + {settings.new_tokens} new tokens exceed the model's {least} positions; "
            "shorten one of them"
        )


def _measure(
    models: tuple[PreTrainedModel, PreTrainedModel], settings: BenchSettings, *, batch_size: int, context: int
) -> BenchPoint:
    prompts_BL = random_prompts(models, batch_size, length=context)
    peaks: tuple[list[int], list[int]] = ([], [])
    timings: tuple[list[Timing], list[Timing]] = ([], [])
    for repeat in range(settings.repeats + 1):
        for model, peak, timing in zip(models, peaks, timings, strict=True):
            trim()
            before = reset_peak()
            run = time_generation(model, prompts_BL, new_tokens=settings.new_tokens, static_cache=settings.static_cache)
            if repeat:  # the first run is the warm-up, which also reads the weights from disk
                peak.append(max(peak_memory() - before, 0))
                timing.append(run)

    def pair(figure: Callable[[Timing], float]) -> Pair:
        base, other = ([figure(timing) for timing in side] for side in timings)
        ratios = [after / before for before, after in zip(base, other, strict=True)]
        return Pair(base=_spread(base), model=_spread(other), ratio=_spread(ratios))

    return BenchPoint(
        batch_size=batch_size,
        context=context,
        first_token=pair(lambda timing: timing.first),
        prefill=pair(lambda timing: batch_size * context / timing.first),
        decode=pair(lambda timing: batch_size * (settings.new_tokens - 1) / timing.rest),
        peak=(max(peaks[0]), max(peaks[1])),
    )


def _spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles; minimum and maximum instead of the quartiles of fewer than four values."""
    if len(values) < 4:
        return Spread(median=median(values), low=min(values), high=max(values))
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, low=low, high=high)
