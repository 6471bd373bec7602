"""The recipe's ``budget`` section: how small the model must become; the shape is searched."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from llmprune.common.schema import Positive, Section, parse_size
from llmprune.criteria.base import ExpertCriterion, WidthCriterion
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.share_taylor import ShareTaylor
from llmprune.recipe.evaluation import Speed
from llmprune.recipe.recover import parse_count


def _fraction_or(parse: Any) -> Any:
    """Return a validator: a float up to 1 is a fraction of the dense model's, anything else an amount."""

    def read(value: Any) -> float | int:
        if isinstance(value, float) and 0 < value <= 1:
            return value
        amount: int = parse(int(value) if isinstance(value, float) and value.is_integer() else value)
        return amount

    return read


Count = Annotated[float | int, BeforeValidator(_fraction_or(parse_count))]
Bytes = Annotated[float | int, BeforeValidator(_fraction_or(parse_size))]


class LayersAxis(Section):
    """Layers may be removed. They are removed one by one, each time the one whose removal costs least."""

    at_least: Positive | None = Field(None, description="Fewest layers kept; default: half of them.")


class MlpAxis(Section):
    """MLP neurons may be removed."""

    at_least: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="Smallest fraction of the neurons kept.")
    multiple: Positive | None = Field(
        None,
        description="Widths are multiples of this; default: 128, or less where a step would be more than 1 % of the "
        "model's parameters, at least 32.",
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
    """What a search may remove. Named axes alone; a section without any name is an error."""

    layers: LayersAxis | None = Field(None, description="Layers.")
    mlp: MlpAxis | None = Field(None, description="MLP neurons.")
    heads: HeadsAxis | None = Field(None, description="Key-value groups of attention heads.")
    experts: ExpertsAxis | None = Field(None, description="Experts.")


class Budget(Section):
    """How small the model must become; several limits hold together. Such as ``budget: {parameters: 0.75}``."""

    parameters: Count | tuple[Count, ...] | None = Field(
        None,
        description="Parameters: 0.75 is a fraction of the dense model's, 6e9 or 6B a number. A list, such as "
        "[0.9, 0.8, 0.7], makes a family of models.",
    )
    active_parameters: Count | tuple[Count, ...] | None = Field(
        None, description="Parameters that a token uses, in models with experts; fraction or number."
    )
    weights: Bytes | tuple[Bytes, ...] | None = Field(
        None, description="Size of the weights: a fraction, or such as 12GB."
    )
    weight_bits: Annotated[float, Field(gt=0, le=64)] | None = Field(
        None,
        description="Bits of a parameter that `weights` counts with, such as 4 for a model that is quantised later; "
        "default: those of the files.",
    )
    kv_cache: Bytes | tuple[Bytes, ...] | None = Field(
        None, description="Key-value cache of a token: a fraction, or such as 80KB."
    )
    speed: Annotated[float, Field(gt=1)] | tuple[Annotated[float, Field(gt=1)], ...] | None = Field(
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
    shapes: Annotated[int, Field(ge=2, le=200)] = Field(24, description="Most shapes that are tried for a size.")

    @property
    def limits(self) -> dict[str, tuple[float | int, ...]]:
        """The limits that are given, by name, each as one value for every model of the family."""
        names = ("parameters", "active_parameters", "weights", "kv_cache", "speed")
        given = {name: getattr(self, name) for name in names}
        return {
            name: value if isinstance(value, tuple) else (value,) for name, value in given.items() if value is not None
        }

    @property
    def speed_settings(self) -> Speed:
        """Settings of the measurements of speed; at least five rounds show how far they spread."""
        return Speed(
            batch_size=self.batch_size, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens, repeats=5
        )

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if not self.limits:
            raise ValueError(
                "needs at least one of parameters, active_parameters, weights, kv_cache, speed; none given"
            )
        return self
