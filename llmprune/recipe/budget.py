"""The recipe's ``budget`` section: how small the model must become; the shape is searched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from llmprune.common.schema import Positive, Section, parse_size
from llmprune.criteria.base import ExpertCriterion, WidthCriterion
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.share_taylor import ShareTaylor
from llmprune.recipe.evaluation import Speed
from llmprune.recipe.width import Multiple

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = "a fraction of the dense model's such as 0.75, or a number such as 6e9 or 6B"
_BYTES = "a fraction of the dense model's such as 0.75, or a size such as 12GB"
_QUICK_SHAPES = 6
_OF_SPEED = ("batch_size", "prompt_tokens", "new_tokens", "speed_table")


def _parameters(value: Any) -> int:
    """Return the number that a count such as ``6B`` or a whole number stands for. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMBT])\s*", str(value))
    if match is None:
        raise ValueError("no number of parameters")
    return round(float(match[1]) * _COUNTS[match[2]])


def _fraction_or(parse: Callable[[Any], int], described: str) -> Callable[[Any], float | int]:
    """Return a validator: a float below 1 is a fraction of the dense model's, anything else an amount above 1."""

    def read(value: Any) -> float | int:
        if isinstance(value, float) and 0 < value < 1:
            return value
        try:
            amount = parse(int(value) if isinstance(value, float) and value.is_integer() else value)
        except ValueError:
            amount = 0
        if amount <= 1:
            raise ValueError(f"must be {described}")
        return amount

    return read


Count = Annotated[float | int, BeforeValidator(_fraction_or(_parameters, _COUNT))]
Bytes = Annotated[float | int, BeforeValidator(_fraction_or(parse_size, _BYTES))]
Times = Annotated[float, Field(gt=1)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
Sizes = Annotated[tuple[Bytes, ...], Field(strict=False, min_length=1)]


class LayersAxis(Section):
    """Layers may be removed. They are removed one by one, each time the one whose removal costs least."""

    at_least: Positive | None = Field(None, description="Fewest layers kept; default: half of them.")


class MlpAxis(Section):
    """MLP neurons may be removed."""

    at_least: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="Smallest fraction of the neurons kept.")
    multiple: Multiple = Field(
        "auto",
        description="Widths are multiples of this number. auto: 256 where that divides a width of at least 2,048 and a "
        "step is at most 3 % of the model's parameters; else 128, or less where a step would be more than 1 % of them, "
        "at least 32.",
    )
    criterion: WidthCriterion = Field(ShareTaylor(), description="How neurons are scored.")


class HeadsAxis(Section):
    """Key-value groups of attention heads may be removed."""

    at_least: Positive | None = Field(None, description="Fewest groups kept in each layer; default: half of them.")
    criterion: WidthCriterion = Field(Activation(), description="How heads are scored.")


class ExpertsAxis(Section):
    """Whole experts may be removed."""

    at_least: Positive | None = Field(None, description="Fewest experts kept in each mixture; default: half of them.")
    criterion: ExpertCriterion = Field(Reap(), description="How experts are scored.")


class Axes(Section):
    """Axes along which a search may remove, such as ``{layers: {}, mlp: {multiple: 256}}`` or ``[mlp]``."""

    layers: LayersAxis | None = Field(None, description="Layers.")
    mlp: MlpAxis | None = Field(None, description="MLP neurons.")
    heads: HeadsAxis | None = Field(None, description="Key-value groups of attention heads.")
    experts: ExpertsAxis | None = Field(None, description="Experts.")

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        """Accept a list of names, and ``true`` for an axis without settings."""
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return {name: {} for name in value}
        if not isinstance(value, dict):
            return value
        unclear = next((name for name, axis in value.items() if axis is None or axis is False), None)
        if unclear is not None:
            raise ValueError(f"{unclear} has no value; write {unclear}: {{}} to use this axis, or leave the key out")
        return {name: {} if axis is True else axis for name, axis in value.items()}

    @model_validator(mode="after")
    def _some_axis(self) -> Self:
        if not self.named:
            raise ValueError(
                f"name at least one of {', '.join(type(self).model_fields)}, such as {{layers: {{}}, mlp: {{}}}}, or "
                "leave axes out for all that the model allows"
            )
        return self

    @property
    def named(self) -> tuple[str, ...]:
        """Names of the axes that may give."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)


class Budget(Section):
    """Limits of the pruned model, which hold together, such as ``budget: {parameters: 0.75}``."""

    parameters: Count | Counts | None = Field(
        None,
        description="Parameters: 0.75 is a fraction of the dense model's, 6e9 or 6B a number. A list, such as "
        "[0.9, 0.8, 0.7], makes a family of models.",
    )
    active_parameters: Count | Counts | None = Field(
        None, description="Parameters that a token uses, in models with experts; fraction or number."
    )
    weights: Bytes | Sizes | None = Field(None, description="Size of the weights: a fraction, or such as 12GB.")
    weight_bits: Annotated[float, Field(gt=0, le=64)] | None = Field(
        None,
        description="Bits of a parameter that `weights` counts with, such as 4 for a model that is quantised later; "
        "default: those of the files.",
    )
    kv_cache: Bytes | Sizes | None = Field(None, description="Key-value cache of a token: a fraction, or such as 80KB.")
    speed: Times | Annotated[tuple[Times, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="Generated tokens a second, times the dense model's: 1.5."
    )
    batch_size: Positive = Field(1, description="Prompts at a time, for `speed`.")
    prompt_tokens: Positive = Field(512, description="Tokens of each prompt, for `speed`.")
    new_tokens: Annotated[int, Field(gt=1)] = Field(64, description="Tokens generated after each prompt, for `speed`.")
    speed_table: str | None = Field(
        None,
        description="File with the times of this model's parts, measured where it will run; left out: they are "
        "measured here.",
    )
    tolerance: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.03, description="A shape may stay below the budget by this fraction of it."
    )
    axes: Axes | None = Field(None, description="What may be removed; left out: all that the model allows.")
    shapes: Annotated[int, Field(ge=2, le=200)] = Field(20, description="Most shapes that are tried for a size.")
    quick: bool = Field(
        False,
        description="A first look in a fraction of the time: at most 6 shapes are tried, each is judged as it is cut, "
        "without a repair, and layers are removed in the order of their own scores. The chosen shape may lose more.",
    )

    @property
    def limits(self) -> dict[str, tuple[float | int, ...]]:
        """The limits that are given, by name, each as one value for every model of the family."""
        names = ("parameters", "active_parameters", "weights", "kv_cache", "speed")
        given = {name: getattr(self, name) for name in names}
        return {
            name: value if isinstance(value, tuple) else (value,) for name, value in given.items() if value is not None
        }

    @property
    def most_shapes(self) -> int:
        """Most shapes that are tried for a size."""
        return min(self.shapes, _QUICK_SHAPES) if self.quick else self.shapes

    @property
    def family(self) -> str | None:
        """Name of the limit that is a list, one value for each model of a family; None for a single model."""
        return next((name for name, values in self.limits.items() if len(values) > 1), None)

    @property
    def speed_settings(self) -> Speed:
        """Settings of the measurements of speed; at least five rounds show how far they spread."""
        return Speed(
            batch_size=self.batch_size, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, repeats=5
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        limits = self.limits
        if not limits:
            raise ValueError(
                "needs at least one of parameters, active_parameters, weights, kv_cache, speed; none given"
            )
        lists = [name for name, values in limits.items() if len(values) > 1]
        if len(lists) > 1:
            raise ValueError(
                f"{' and '.join(lists)} are lists; only one limit can be, with a value for each model of the family"
            )
        repeated = [name for name in lists if len(set(limits[name])) < len(limits[name])]
        if repeated:
            raise ValueError(f"{repeated[0]} has a value twice; name each size of the family once")
        if self.weight_bits is not None and self.weights is None:
            raise ValueError(
                "weight_bits says how weights are counted, and weights is not given; add it or remove the key"
            )
        idle = [name for name in _OF_SPEED if name in self.model_fields_set]
        if idle and self.speed is None:
            raise ValueError(
                f"{' and '.join(idle)} say{'s' * (len(idle) == 1)} how speed is measured, and speed is not given; add "
                f"it or remove the key{'s' * (len(idle) > 1)}"
            )
        return self
