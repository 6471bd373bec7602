"""The importance criteria, by the ``kind`` that a recipe names.

A new criterion is one file beside this one and one name in a union here.
"""

from __future__ import annotations

from llmprune.criteria.activation import Activation
from llmprune.criteria.angular import Angular
from llmprune.criteria.block_influence import BlockInfluence
from llmprune.criteria.divergence import Divergence
from llmprune.criteria.flap import Flap
from llmprune.criteria.magnitude import Magnitude
from llmprune.criteria.obs import Obs
from llmprune.criteria.perplexity import Perplexity
from llmprune.criteria.reap import Reap
from llmprune.criteria.residual import Residual
from llmprune.criteria.share import Share
from llmprune.criteria.taylor import Taylor
from llmprune.criteria.taylor_share import TaylorShare
from llmprune.criteria.wanda import Wanda

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
