"""The recipe's ``depth`` section: which decoder layers are removed."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from llmprune.common.schema import Section, exactly_one
from llmprune.criteria.base import DepthCriterion
from llmprune.criteria.depth.divergence import Divergence


class Depth(Section):
    """Removal of decoder layers: by a number to remove, by a number to keep, or by their indices."""

    remove: int | None = Field(None, gt=0, description="Number of layers to remove.")
    keep: int | None = Field(None, gt=0, description="Number of layers to keep.")
    layers: tuple[int, ...] | None = Field(
        None, strict=False, min_length=1, description="Indices of the layers to remove, from 0."
    )
    criterion: DepthCriterion = Field(Divergence(), description="How layers are scored.")
    keep_pattern: bool = Field(
        False,
        description="Remove only layers whose removal preserves the period in which kinds of layers repeat, such as "
        "sliding and full attention; tools that assume the period need it.",
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        exactly_one(self, ("remove", "keep", "layers"))
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError("layers names a layer twice; name each layer once")
        if self.layers is not None and min(self.layers) < 0:
            raise ValueError("layers counts from 0; negative indices are not accepted")
        return self
