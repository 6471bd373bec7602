"""The recipe's ``width`` section."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from llmprune.common.schema import Positive, Section, exactly_one
from llmprune.criteria.base import WidthCriterion
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.share import Share


class Width(Section):
    """How many MLP neurons and attention heads stay in every layer: fractions, or numbers."""

    mlp: float | None = Field(None, gt=0, le=1, description="Fraction of the MLP neurons kept.")
    neurons: Positive | dict[str, Positive] | None = Field(
        None, description="Number of MLP neurons kept; of a model with several widths, by the config field of each."
    )
    heads: Positive | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Key-value groups of attention heads kept in every layer, each with the query heads that read it: "
        "2 is a number, 0.5 a fraction.",
    )
    criterion: WidthCriterion | None = Field(
        None,
        description="How neurons and heads are scored; default: neurons by share, heads by activation.",
    )

    @model_validator(mode="after")
    def _targets(self) -> Self:
        if self.cuts_mlp:
            exactly_one(self, ("mlp", "neurons"))
        elif self.heads is None:
            raise ValueError("needs at least one of mlp, neurons, heads; none given")
        return self

    @property
    def neurons_by(self) -> WidthCriterion:
        """What scores the neurons."""
        return self.criterion or Share()

    @property
    def heads_by(self) -> WidthCriterion:
        """What scores the heads. By ``share`` SmolLM2 kept less on each of three texts."""
        return self.criterion or Activation()

    @property
    def cuts_mlp(self) -> bool:
        """Whether it says how many MLP neurons stay."""
        return self.mlp is not None or self.neurons is not None
