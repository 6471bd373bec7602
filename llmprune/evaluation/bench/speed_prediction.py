"""Prediction of a shape's generation speed from a table of times by part.

    seconds(shape) = outside + vocabulary(tokens)
                     + layers · (attention(groups) + mlp(width) + experts(number) · mlp(width) / mlp(dense))

Between measured points, and beyond them, each part is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean

from llmprune.common.errors import EvaluationError
from llmprune.cut.shape import Shape
from llmprune.results.figures.speed_table import ModelSizes, PartAt, PartTimes, SpeedPrediction, SpeedTable
from llmprune.results.formatting import percent


def predict(table: SpeedTable, shape: Shape) -> SpeedPrediction:
    """Predict prefill, decoding, and tokens per second of a shape of the table's model."""
    times, dense = _times(table, shape), _times(table, dense_shape(table.sizes))
    return SpeedPrediction(
        prefill=times.prefill,
        decode=times.decode,
        tokens_per_second=table.batch_size * table.new_tokens / generation_seconds(times, table.new_tokens),
        ratio=generation_seconds(dense, table.new_tokens) / generation_seconds(times, table.new_tokens),
    )


def dense_shape(sizes: ModelSizes) -> Shape:
    """Return the shape of the dense model."""
    return Shape(sizes.layers, tuple(sorted(sizes.widths.items())), sizes.kv_groups, sizes.experts)


def generation_seconds(times: PartTimes, new_tokens: int) -> float:
    """Return the seconds of a generation; the prefill gives the first of the new tokens."""
    return times.prefill + (new_tokens - 1) * times.decode


def can_tell(table: SpeedTable, asked: float) -> bool:
    """Check that the uncertainty of the table's ratios is at most half of the gain that is asked for."""
    return table.uncertainty <= (asked - 1) / 2


def require_telling(table: SpeedTable, asked: float) -> None:
    """Raise EvaluationError where a speed cannot be told from 1. ``asked``: times the dense."""
    if can_tell(table, asked):
        return
    case = f"--batch-size {table.batch_size} --prompt-tokens {table.prompt_tokens} --new-tokens {table.new_tokens}"
    raise EvaluationError(
        f"budget.speed: {asked:g} cannot be told from 1 by measurements on {table.device}: the middle half of "
        f"{table.rounds} rounds spreads over {percent(table.spread)}, so that a ratio is known to "
        f"± {percent(table.uncertainty)}; the limit is half of the gain, {percent((asked - 1) / 2)}. End other "
        f"programs and run again, measure more often with `llmprune speed {table.model} {case} --repeats 30 --output "
        "FILE`, or give a table that was measured elsewhere (budget.speed_table)"
    )


def _times(table: SpeedTable, shape: Shape) -> PartTimes:
    """Return the times of a whole model."""
    sizes, neurons = table.sizes, shape.neurons
    width = mean(neurons[field] / dense for field, dense in sizes.widths.items()) if sizes.widths else 1.0
    groups = shape.kv_groups / sizes.kv_groups if shape.kv_groups and sizes.kv_groups else 1.0
    experts = shape.experts / sizes.experts if shape.experts and sizes.experts else 1.0
    tokens = shape.tokens / sizes.vocabulary if shape.tokens and sizes.vocabulary else 1.0

    def seconds(part: str) -> float:
        mlp = _interpolated(table.mlp, width, part=part)
        whole = _interpolated(table.mlp, 1.0, part=part)
        fewer = _interpolated(table.experts, experts, part=part) * (mlp / whole if whole else 1.0)
        layer = _interpolated(table.attention, groups, part=part) + mlp + fewer
        outside: float = getattr(table.outside, part)
        return outside + _interpolated(table.vocabulary, tokens, part=part) + shape.layers * layer

    return PartTimes(prefill=seconds("prefill"), decode=seconds("decode"))


def _interpolated(points: Sequence[PartAt], at: float, *, part: str) -> float:
    """Return a time on the line through the two measured points around ``at``, or through the nearest two."""
    values: list[tuple[float, float]] = [(point.at, getattr(point, part)) for point in points]
    if len(values) < 2:
        return sum(value for _, value in values)
    (left, low), (right, high) = next(
        ((first, second) for first, second in pairwise(values) if at <= second[0]), tuple(values[-2:])
    )
    share = (at - left) / (right - left)
    return low * (1 - share) + high * share
