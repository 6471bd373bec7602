"""Measurement of a speed table: models of a few shapes generate in turn, and differences give the times of the parts.

The dense model with half of its layers gives the time of a layer, and what remains is outside the layers. Models with
narrower MLPs, fewer key-value groups and fewer experts give the times of the parts of a layer, one with fewer tokens
that of embeddings and head. The weights of each model are far larger than the caches of a CPU, so that every token
reads them from memory, as with a whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.anatomy.vocabulary import find_vocabulary
from llmprune.common.devices import device_name, input_device
from llmprune.common.errors import ModelError
from llmprune.common.progress import track
from llmprune.cut.shape import Shape
from llmprune.evaluation.bench.generation_speed import (
    Timing,
    clock_of_models_in_memory,
    random_prompts,
    require_positions,
    time_generation,
)
from llmprune.evaluation.bench.random_models import meta_model, random_models
from llmprune.evaluation.bench.speed_prediction import generation_seconds
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.recipe.evaluation import Speed
from llmprune.recipe.width_rounding import round_width
from llmprune.results.figures.speed_table import PartAt, PartTimes, SpeedTable, uncertainty

_FRACTIONS = (0.4, 0.7)  # of the neurons
LAYER_BYTES = 2**31  # far more than the caches of a CPU
_MORE_ROUNDS = 2  # times the rounds asked for, where the measurements differ
_PRECISE = 0.02  # uncertainty of ratios at which no further round is measured

Timer = Callable[[PreTrainedModel, Tensor, int], Timing]  # model, prompts [B, L], new tokens


@dataclass(frozen=True)
class _Points:
    """Shapes to be timed. ``half``: with fewer layers; None where the model's depth cannot be cut.

    The others have as many layers as ``dense``, by the fraction of their neurons, groups, experts or tokens.
    """

    dense: Shape
    half: Shape | None
    widths: dict[float, Shape]
    groups: dict[float, Shape]
    experts: dict[float, Shape]
    tokens: dict[float, Shape]

    @property
    def all(self) -> list[Shape]:
        """Return all shapes, the dense one first."""
        others = [
            shape for points in (self.widths, self.groups, self.experts, self.tokens) for shape in points.values()
        ]
        return [self.dense, *([self.half] if self.half else []), *others]


def measure_speed_table(
    subject: SpeedSubject, *, settings: Speed, time: Timer | None = None, layer_bytes: int = LAYER_BYTES
) -> SpeedTable:
    """Measure the times of a model's parts.

    ``settings.repeats``: rounds in which every model generates once; up to twice as many where the ratios of their
    times are less precise than 2 %. ``layer_bytes``: most bytes of the layers of a timed model; of larger ones only
    some layers are timed. Raises RecipeError where the model has too few positions, ModelError where the memory is too
    small.
    """
    require_positions(settings, subject.config, section="budget")
    points = _points(subject, layer_bytes)
    models = dict(zip(points.all, random_models(subject, points.all), strict=True))
    rounds = _Rounds(models, settings, time=time or _time)
    rounds.run()
    measured = {shape: rounds.times(shape) for shape in models}
    parts = _Parts(points, measured)
    return SpeedTable(
        model=subject.source.id,
        sizes=subject.sizes,
        dtype=subject.dtype_name,
        device=device_name(subject.device),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        batch_size=settings.batch_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        layers_timed=points.dense.layers,
        rounds=rounds.count,
        spread=rounds.spread,
        outside=parts.outside(),
        attention=parts.attention(),
        mlp=parts.mlp(),
        experts=parts.experts(),
        vocabulary=parts.vocabulary(),
    )


def _time(model: PreTrainedModel, prompts_BL: Tensor, new_tokens: int) -> Timing:  # noqa: PLR0917 - a Timer
    clock = clock_of_models_in_memory(input_device(model))
    return time_generation(model, prompts_BL, new_tokens=new_tokens, clock=clock)


class _Rounds:
    """Times of all models, which generate in turn. The first round is the warm-up, and is not kept."""

    def __init__(self, models: dict[Shape, PreTrainedModel], settings: Speed, *, time: Timer) -> None:
        self._models, self._settings, self._time = models, settings, time
        self._prompts_BL = random_prompts(tuple(models.values()), settings.batch_size, length=settings.prompt_tokens)
        self._kept: dict[Shape, list[PartTimes]] = {shape: [] for shape in models}

    @property
    def count(self) -> int:
        """Number of the rounds that are kept."""
        return len(self._kept[self._dense])

    @property
    def _dense(self) -> Shape:
        return next(iter(self._models))

    def run(self) -> None:
        """Time the models until the ratios of their times are precise, or for the most rounds."""
        least = self._settings.repeats
        for index in track(range(_MORE_ROUNDS * least + 1), "times by part"):
            for shape, model in self._models.items():
                timing = self._time(model, self._prompts_BL, self._settings.new_tokens)
                if index:
                    decode = timing.rest / (self._settings.new_tokens - 1)
                    self._kept[shape].append(PartTimes(prefill=timing.first, decode=decode))
            if index >= least and uncertainty(self.spread, index) <= _PRECISE:
                break

    def times(self, shape: Shape) -> PartTimes:
        """Return the median times of the dense model, times the median ratio of this model's times to them."""

        def seconds(part: str) -> float:
            pairs = [(getattr(one, part), getattr(dense, part)) for one, dense in self._pairs(shape)]
            typical = float(median(dense for _, dense in pairs))
            return typical * float(median(one / dense for one, dense in pairs))

        return PartTimes(prefill=seconds("prefill"), decode=seconds("decode"))

    @property
    def spread(self) -> float:
        """Largest interquartile range / median of the ratios of a model's whole time to the dense model's."""
        return max((self._spread_of(shape) for shape in self._models if shape != self._dense), default=0.0)

    def _spread_of(self, shape: Shape) -> float:
        whole = [[generation_seconds(each, self._settings.new_tokens) for each in pair] for pair in self._pairs(shape)]
        ratios = [one / dense for one, dense in whole]
        if len(ratios) < 2:
            return 0.0
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        return (high - low) / middle

    def _pairs(self, shape: Shape) -> list[tuple[PartTimes, PartTimes]]:
        return list(zip(self._kept[shape], self._kept[self._dense], strict=True))


@dataclass(frozen=True)
class _Parts:
    """Times of the parts, from those of whole models."""

    points: _Points
    measured: dict[Shape, PartTimes]

    def outside(self) -> PartTimes:
        """Return the times of the dense model less those of as many layers as it has, all like the removed ones."""
        return PartTimes(prefill=self._outside("prefill"), decode=self._outside("decode"))

    def attention(self) -> tuple[PartAt, ...]:
        """Return a layer's times without the MLP's, by fraction of the key-value groups."""
        points = {**self.points.groups, 1.0: self.points.dense}
        return self._by_fraction(points, lambda shape, part: self._layer(shape, part) - self._mlp(part))

    def mlp(self) -> tuple[PartAt, ...]:
        """Return the times of a layer's MLP, by fraction of its neurons."""
        if not self.points.widths:
            return ()
        points = {**self.points.widths, 1.0: self.points.dense}
        without = {part: self._layer(self.points.dense, part) - self._mlp(part) for part in ("prefill", "decode")}
        return self._by_fraction(points, lambda shape, part: self._layer(shape, part) - without[part])

    def experts(self) -> tuple[PartAt, ...]:
        """Return the change of a layer's times by fraction of its experts."""
        if not self.points.experts:
            return ()
        points = {**self.points.experts, 1.0: self.points.dense}
        dense = self.points.dense
        return self._by_fraction(points, lambda shape, part: self._layer(shape, part) - self._layer(dense, part))

    def vocabulary(self) -> tuple[PartAt, ...]:
        """Return the change of the times outside the layers by fraction of the tokens."""
        if not self.points.tokens:
            return ()
        dense = self.points.dense
        points = {**self.points.tokens, 1.0: dense}
        return self._by_fraction(points, lambda shape, part: self._whole(shape, part) - self._whole(dense, part))

    def _whole(self, shape: Shape, part: str) -> float:
        value: float = getattr(self.measured[shape], part)
        return value

    def _outside(self, part: str) -> float:
        dense, half = self.points.dense, self.points.half
        if half is None:
            return 0.0
        deep, shallow = self._whole(dense, part), self._whole(half, part)
        return deep - (deep - shallow) / (dense.layers - half.layers) * dense.layers

    def _layer(self, shape: Shape, part: str) -> float:
        """Return the time of a layer; the time outside the layers is the dense model's."""
        return (self._whole(shape, part) - self._outside(part)) / shape.layers

    def _mlp(self, part: str) -> float:
        """Return the time of the dense MLP, from the slope of a layer's time over the width (least squares).

        At least 0, and at most the layer's.
        """
        points = {**self.points.widths, 1.0: self.points.dense}
        if len(points) == 1:
            return 0.0
        values = {at: self._layer(shape, part) for at, shape in points.items()}
        middle, level = sum(values) / len(values), sum(values.values()) / len(values)
        above = sum((at - middle) * (value - level) for at, value in values.items())
        slope = above / sum((at - middle) ** 2 for at in values)
        return min(max(slope, 0.0), values[1.0])

    def _by_fraction(self, points: dict[float, Shape], value: Callable[[Shape, str], float]) -> tuple[PartAt, ...]:
        return tuple(
            PartAt(at=at, prefill=value(points[at], "prefill"), decode=value(points[at], "decode"))
            for at in sorted(points)
        )


def _points(subject: SpeedSubject, layer_bytes: int) -> _Points:
    """Return the shapes to be timed: few, and every unit that can be removed in at least two numbers."""
    anatomy, sizes = subject.anatomy, subject.sizes
    full, half = _depths(subject, layer_bytes)
    dense = replace(subject.shape, layers=full)
    shallow = None if half is None else replace(dense, layers=half)
    widths: dict[float, Shape] = {}
    for fraction in _FRACTIONS if sizes.widths else ():
        kept = {field: round_width(fraction * width, width) for field, width in sizes.widths.items()}
        exact = sum(kept[field] / width for field, width in sizes.widths.items()) / len(kept)
        if exact < 1:
            widths[exact] = replace(dense, widths=tuple(sorted(kept.items())))
    groups: dict[float, Shape] = {}
    if sizes.kv_groups and anatomy.heads and anatomy.heads.possible:
        fewer = _near_half(anatomy.heads.possible, sizes.kv_groups)
        groups[fewer / sizes.kv_groups] = replace(dense, kv_groups=fewer)
    experts: dict[float, Shape] = {}
    if sizes.experts and anatomy.experts and len(anatomy.experts.possible) > 1:
        fewer = _near_half(anatomy.experts.possible[:-1], sizes.experts)
        experts[fewer / sizes.experts] = replace(dense, experts=fewer)
    return _Points(
        dense, shallow, widths=widths, groups=groups, experts=experts, tokens=_half_the_tokens(subject, dense)
    )


def _half_the_tokens(subject: SpeedSubject, dense: Shape) -> dict[float, Shape]:
    """Return the shape with half of the tokens, by their fraction; none where the vocabulary cannot be cut."""
    model = meta_model(subject, subject.shape, layers=range(subject.anatomy.num_layers))
    try:
        tokens = find_vocabulary(model, trust_remote_code=subject.source.trust_remote_code).tokens
    except ModelError:
        return {}
    return {tokens // 2 / tokens: replace(dense, tokens=tokens // 2)}


def _depths(subject: SpeedSubject, layer_bytes: int) -> tuple[int, int | None]:
    """Return the layers of the deeper and of the shallower model; None for a model that needs all of its layers.

    All layers where their weights are not too large, and about half of them. Whole periods of layers of different kinds
    are left out.
    """
    anatomy = subject.anatomy
    count, period = anatomy.num_layers, math.lcm(1, *(pattern.period for pattern in anatomy.patterns))
    if anatomy.depth_refusal or count <= period:
        return count, None
    _, layers = find_layers(meta_model(subject, subject.shape, layers=range(count)))
    each = sum(weight.numel() * weight.itemsize for weight in layers.parameters()) / count
    most = max(int(layer_bytes / each), 2 * period)
    full = count - period * max(math.ceil((count - most) / period), 0)
    return full, full - period * max(full // 2 // period, 1)


def _near_half(possible: Sequence[int], count: int) -> int:
    """Return the largest possible number up to half of the count; the smallest where all are larger."""
    return max((one for one in possible if 2 * one <= count), default=min(possible))
