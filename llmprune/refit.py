from __future__ import annotations
from pydantic import Field
from llmprune.schema import Section
class Refit(Section):
    """The closed-form repair of what is left."""

    ridge: float = Field(
        0.1, ge=0, description="Pull towards the sliced weights, in units of the mean of diag(XᵀX)."
    )
