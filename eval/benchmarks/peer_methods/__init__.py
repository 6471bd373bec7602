"""Pruning methods of others behind one interface, to be measured like llmprune: one file and one line each.

They take decoders shaped like Llama or Gemma 3: gate, up and down projections in ``model.layers[i].mlp``, with or
without norms behind attention and MLP. Methods without an installable package are written from their papers.
"""

from __future__ import annotations

from peer_methods.base import Peer
from peer_methods.flap import FLAP
from peer_methods.linear_patch import LinearPatch
from peer_methods.llm_pruner import LLMPruner
from peer_methods.optipfair_own import Optipfair
from peer_methods.osscar import OSSCAR
from peer_methods.prune_comp import PruneComp
from peer_methods.pruneme import PruneMe
from peer_methods.replaceme import ReplaceMe
from peer_methods.shortgpt import ShortGPT
from peer_methods.sleb import SLEB

PEERS: dict[str, type[Peer]] = {
    "ShortGPT": ShortGPT,
    "PruneMe": PruneMe,
    "ReplaceMe": ReplaceMe,
    "LinearPatch": LinearPatch,
    "Prune&Comp": PruneComp,
    "FLAP": FLAP,
    "LLM-Pruner": LLMPruner,
    "optipfair": Optipfair,
    "OSSCAR": OSSCAR,
    "SLEB": SLEB,
}
PACKAGES = {"optipfair": "optipfair"}  # peers that run their own code, and the package with it
