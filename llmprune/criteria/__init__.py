"""The importance criteria, by the ``kind`` that a recipe names.

A new criterion is one file beside this one and one name in a union here.
"""

from __future__ import annotations

from llmprune.criteria.activation import Activation
from llmprune.criteria.block_influence import BlockInfluence
from llmprune.criteria.reap import Reap

AnyDepthCriterion = BlockInfluence
AnyWidthCriterion = Activation
AnyExpertCriterion = Reap

__all__ = ["Activation", "AnyDepthCriterion", "AnyExpertCriterion", "AnyWidthCriterion", "BlockInfluence", "Reap"]
