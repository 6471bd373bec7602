"""The recipe's ``experts`` section: how many experts are removed from each mixture, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmprune.common.schema import Section, exactly_one
from llmprune.criteria.base import ExpertCriterion
from llmprune.criteria.experts.reap import Reap


class Experts(Section):
    """Removal of experts: by a number to remove from each mixture, or by a number to keep."""

    remove: int | None = Field(None, gt=0, description="Number of experts to remove from each mixture.")
    keep: int | None = Field(None, gt=0, description="Number of experts to keep in each mixture.")
    method: Literal["drop", "merge"] = Field(
        "drop",
        description="drop: removed experts are left out; merge: their weights are averaged into the kept expert whose "
        "outputs are nearest, by usage.",
    )
    criterion: ExpertCriterion = Field(Reap(), description="How experts are scored.")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        exactly_one(self, ("remove", "keep"))
        return self
