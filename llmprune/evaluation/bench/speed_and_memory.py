"""``llmprune bench``: two models timed in turn on this machine, over batch sizes and context lengths.

Everything is measured but the energy, which follows from the sizes: each decoded token reads the weights once from
DRAM, at 640 pJ per 32-bit word (Horowitz, "Computing's energy problem", ISSCC 2014: 45 nm, LPDDR2). An estimate for
comparing two models, not a figure of this machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING

from llmprune.common.errors import RecipeError
from llmprune.common.process_memory import peak_memory, reset_peak, trim
from llmprune.common.progress import track
from llmprune.evaluation.bench.generation_speed import (
    Timing,
    device_name,
    input_device,
    random_prompts,
    time_generation,
)
from llmprune.results.bench_figures import BenchFigures, BenchPoint, BenchSize, Pair, Spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICOJOULES_PER_WORD = 640  # of 32 bits

Models = tuple["PreTrainedModel", "PreTrainedModel"]  # base, model


def run_bench(
    names: tuple[str, str],
    models: Models,
    *,
    sizes: tuple[BenchSize, BenchSize],
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
    repeats: int,
    static_cache: bool = False,
) -> BenchFigures:
    """Greedy generation of both models in turn, B A B A, after a warm-up of each; base first in every pair of values.

    Raises RecipeError where context and new tokens are more than a model has positions.
    """
    require_room(models, contexts, new_tokens=new_tokens)
    places = [(batch, context) for batch in batch_sizes for context in contexts]
    points = []
    for place in track(range(len(places)), "bench"):
        points.append(
            _measure(models, places[place], new_tokens=new_tokens, repeats=repeats, static_cache=static_cache)
        )
    return BenchFigures(
        base=names[0],
        model=names[1],
        base_size=sizes[0],
        model_size=sizes[1],
        points=tuple(points),
        repeats=repeats,
        new_tokens=new_tokens,
        cache="static" if static_cache else "dynamic",
        device=" and ".join(sorted({device_name(input_device(model)) for model in models})),
        dtype=" and ".join(sorted({str(model.dtype).removeprefix("torch.") for model in models})),
    )


def require_room(models: Models, contexts: Sequence[int], *, new_tokens: int) -> None:
    """Raise RecipeError where the longest context does not fit into both models."""
    positions = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    least = min((count for count in positions if count), default=None)
    if least and max(contexts) + new_tokens > least:
        raise RecipeError(
            f"--contexts: {max(contexts)} + {new_tokens} new tokens exceed the model's {least} positions; "
            "shorten one of them"
        )


def decoded_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one decoded token reads, in a batch of one.

    All of them but the embedding table, of which it reads one row, unless the table is the output head as well. Of a
    mixture of experts all experts count, so there it is an upper bound.
    """
    tensors = {id(parameter): parameter for parameter in model.parameters()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is not None and (head is None or head.weight is not table.weight):
        tensors.pop(id(table.weight), None)
    return sum(parameter.numel() * parameter.itemsize for parameter in tensors.values())


def joules(read_bytes: int) -> float:
    """Estimated DRAM energy of reading so many bytes."""
    return read_bytes / 4 * PICOJOULES_PER_WORD * 1e-12


def _measure(
    models: Models, place: tuple[int, int], *, new_tokens: int, repeats: int, static_cache: bool
) -> BenchPoint:
    """``place``: batch size and context length."""
    batch_size, context = place
    prompts_BL = random_prompts(models, batch_size, length=context)
    peaks: tuple[list[int], list[int]] = ([], [])
    timings: tuple[list[Timing], list[Timing]] = ([], [])
    for repeat in range(repeats + 1):
        for model, peak, timing in zip(models, peaks, timings, strict=True):
            trim()
            before = reset_peak()
            taken = time_generation(model, prompts_BL, new_tokens=new_tokens, static_cache=static_cache)
            if repeat:  # the first is the warm-up, which also brings the weights from disk
                peak.append(max(peak_memory() - before, 0))
                timing.append(taken)

    def pair(figure: Callable[[Timing], float]) -> Pair:
        base, other = ([figure(one) for one in side] for side in timings)
        ratios = [after / before for before, after in zip(base, other, strict=True)]
        return Pair(base=_spread(base), model=_spread(other), ratio=_spread(ratios))

    return BenchPoint(
        batch_size=batch_size,
        context=context,
        first_token=pair(lambda one: one.first),
        prefill=pair(lambda one: batch_size * context / one.first),
        decode=pair(lambda one: batch_size * (new_tokens - 1) / one.rest),
        peak=(max(peaks[0]), max(peaks[1])),
    )


def _spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of fewer than four values the least and the most."""
    if len(values) < 4:
        return Spread(median=median(values), low=min(values), high=max(values))
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, low=low, high=high)
