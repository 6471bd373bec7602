"""Router-weighted expert activation: REAP, arXiv 2510.13999.

    score of expert j = mean over the tokens routed to j of gate_j(x) · ‖f_j(x)‖₂

It measures how much the expert adds to the hidden states of its tokens. An expert that no token is routed to scores 0
and is removed first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.base import ExpertAccumulator
from llmprune.criteria.accumulators.mean_over_tokens import MeanOverTokens
from llmprune.criteria.base import ExpertCriterion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Reap(ExpertCriterion):
    """``experts: {remove: 8, criterion: {kind: reap}}``."""

    kind: Literal["reap"] = "reap"

    def make_accumulator(self, experts: int, device: torch.device) -> ExpertAccumulator:
        """Return the empty accumulator of one layer's experts."""
        return _WeightedNorms(device, experts)


class _WeightedNorms(MeanOverTokens, ExpertAccumulator):
    def update(self, expert: int, added_TD: Tensor) -> None:
        self.add(added_TD.float().norm(dim=-1), expert)

    def scores(self) -> Tensor:
        return self.means().float()
