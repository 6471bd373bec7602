"""Block influence: ShortGPT, arXiv 2403.03853, equation 1.

    BI = 1 − mean over tokens of cos(hidden before the layer, hidden after it)

A layer that hardly turns the hidden states can go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.base import LayerAccumulator, PassingCriterion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BlockInfluence(PassingCriterion):
    """``depth: {remove: 6, criterion: {kind: block_influence}}``."""

    kind: Literal["block_influence"] = "block_influence"

    def open(self, device: torch.device) -> LayerAccumulator:
        """Start the sums of one layer, which runs on this device."""
        return _Cosines(device)


class _Cosines(LayerAccumulator):
    def __init__(self, device: torch.device) -> None:
        import torch

        self.total_and_tokens = torch.zeros(2, dtype=torch.float64, device=device)

    def sums(self) -> list[Tensor]:
        return [self.total_and_tokens]

    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        before_BLD, after_BLD = hidden_BLD.float(), output_BLD.float()
        norms_BL = before_BLD.norm(dim=-1) * after_BLD.norm(dim=-1)
        cosine_BL = (before_BLD * after_BLD).sum(-1) / norms_BL.clamp_min(1e-30)
        self.total_and_tokens[0] += cosine_BL.double().sum()
        self.total_and_tokens[1] += cosine_BL.numel()

    def score(self) -> Tensor:
        return (1 - self.total_and_tokens[0] / self.total_and_tokens[1]).float()
