"""The importance criteria, by the ``kind`` that a recipe names.

A new criterion is one file beside this one and one name in a union here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmprune.criteria.activation import Activation
from llmprune.criteria.angular import Angular
from llmprune.criteria.block_influence import BlockInfluence
from llmprune.criteria.divergence import Divergence
from llmprune.criteria.perplexity import Perplexity
from llmprune.criteria.reap import Reap
from llmprune.criteria.residual import Residual

AnyDepthCriterion = Annotated[
    BlockInfluence | Angular | Perplexity | Divergence | Residual, Field(discriminator="kind")
]
AnyWidthCriterion = Activation
AnyExpertCriterion = Reap

__all__ = [
    "Activation",
    "Angular",
    "AnyDepthCriterion",
    "AnyExpertCriterion",
    "AnyWidthCriterion",
    "BlockInfluence",
    "Divergence",
    "Perplexity",
    "Reap",
    "Residual",
]
