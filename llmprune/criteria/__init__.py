"""The importance criteria, by the ``kind`` that a recipe names.

A new criterion is one file beside this one and one name in a union here.
"""

from __future__ import annotations

from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.depth.repaired_divergence import Residual
from llmprune.criteria.experts.reap import Reap
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.flap import Flap
from llmprune.criteria.width.magnitude import Magnitude
from llmprune.criteria.width.obs import Obs
from llmprune.criteria.width.share import Share
from llmprune.criteria.width.taylor import Taylor
from llmprune.criteria.width.taylor_share import TaylorShare
from llmprune.criteria.width.wanda import Wanda

AnyDepthCriterion = BlockInfluence | Angular | Perplexity | Divergence | Residual
AnyWidthCriterion = Activation | Flap | Magnitude | Obs | Share | Taylor | TaylorShare | Wanda
AnyExpertCriterion = Reap

__all__ = [
    "Activation",
    "Angular",
    "AnyDepthCriterion",
    "AnyExpertCriterion",
    "AnyWidthCriterion",
    "BlockInfluence",
    "Divergence",
    "Flap",
    "Magnitude",
    "Obs",
    "Perplexity",
    "Reap",
    "Residual",
    "Share",
    "Taylor",
    "TaylorShare",
    "Wanda",
]
