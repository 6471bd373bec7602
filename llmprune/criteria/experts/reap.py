"""Router-weighted expert activation: REAP, arXiv 2510.13999.

    score of expert j = mean over the tokens routed to j of gate_j(x) · ‖f_j(x)‖₂

how much the expert adds to the hidden states of the tokens that it gets. An expert
that no token is routed to scores 0 and goes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.base import ExpertAccumulator, ExpertCriterion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Reap(ExpertCriterion):
    """``experts: {remove: 8, criterion: {kind: reap}}``."""

    kind: Literal["reap"] = "reap"

    def open(self, experts: int, device: torch.device) -> ExpertAccumulator:
        """Start the sums of one layer's experts, which run on this device."""
        return _WeightedNorms(experts, device)


class _WeightedNorms(ExpertAccumulator):
    def __init__(self, experts: int, device: torch.device) -> None:
        import torch

        self.total_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.tokens_E = torch.zeros(experts, dtype=torch.float64, device=device)

    def sums(self) -> list[Tensor]:
        return [self.total_E, self.tokens_E]

    def update(self, expert: int, added_TD: Tensor) -> None:
        self.total_E[expert] += added_TD.float().norm(dim=-1).double().sum()
        self.tokens_E[expert] += len(added_TD)

    def scores(self) -> Tensor:
        return (self.total_E / self.tokens_E.clamp_min(1)).float()
