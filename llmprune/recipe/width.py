"""The recipe's ``width`` section: how many MLP neurons and attention heads are kept."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmprune.common.schema import Positive, Section, exactly_one
from llmprune.criteria.base import WidthCriterion
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.share_taylor import ShareTaylor

Multiple = Positive | Literal["auto"]


class Width(Section):
    """MLP neurons and attention heads to keep in every layer, as fractions or numbers."""

    mlp: float | None = Field(None, gt=0, le=1, description="Fraction of the MLP neurons kept.")
    neurons: Positive | dict[str, Positive] | None = Field(
        None, description="Number of MLP neurons kept; for a model with several widths, a mapping by config field."
    )
    heads: Positive | Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Key-value groups of attention heads kept in every layer, each with its query heads: 2 is a "
        "number, 0.5 a fraction.",
    )
    multiple: Multiple = Field(
        "auto",
        description="The number of neurons kept is rounded to a multiple of this number. auto: 256 where that divides "
        "a width of at least 2,048 (k-quants of llama.cpp, FP8 blocks), else 128, or the largest power of two that "
        "divides the width.",
    )
    criterion: WidthCriterion | None = Field(
        None,
        description="How neurons and heads are scored; default: neurons by share_taylor, heads by activation.",
    )
    heads_criterion: WidthCriterion | None = Field(
        None, description="How heads are scored, where it is not as the neurons; default: criterion."
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.cuts_mlp:
            exactly_one(self, ("mlp", "neurons"))
        elif self.heads is None:
            raise ValueError("needs at least one of mlp, neurons, heads; none given")
        if self.multiple != "auto" and not self.cuts_mlp:
            raise ValueError("multiple rounds the number of neurons; give mlp or neurons, or remove it")
        if self.heads_criterion is not None and self.heads is None:
            raise ValueError("heads_criterion scores heads; give heads, or remove it")
        return self

    @property
    def neuron_criterion(self) -> WidthCriterion:
        """The criterion that scores neurons."""
        return self.criterion or ShareTaylor()

    @property
    def head_criterion(self) -> WidthCriterion:
        """The criterion that scores heads. With ``share``, SmolLM2 retained less on each of three texts."""
        return self.heads_criterion or self.criterion or Activation()

    def windows_for_gradients(self, windows: int, generated: int) -> int:
        """Return the number of calibration windows that have a backward pass: of all, and of those generated."""
        used = (self.cuts_mlp and self.neuron_criterion, self.heads is not None and self.head_criterion)
        return max(one.windows_for_gradients(windows, generated) if one else 0 for one in used)

    @property
    def cuts_mlp(self) -> bool:
        """True where the section sets the number of MLP neurons."""
        return self.mlp is not None or self.neurons is not None
