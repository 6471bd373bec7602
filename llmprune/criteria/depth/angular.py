"""Angular distance of blocks of layers: The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887.

    d(l, n) = mean over sequences of arccos( cos( hidden before layer l, hidden before layer l + n ) ) / π

of the last token, as in the paper, or of all. The n neighbouring layers that turn the hidden states
least go together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmprune.criteria.base import LayerAccumulator, PassingCriterion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Angular(PassingCriterion):
    """``depth: {remove: 6, criterion: {kind: angular}}``."""

    kind: Literal["angular"] = "angular"
    tokens: Literal["last", "all"] = Field("last", description="Tokens of each window that are looked at.")

    def horizon(self, remove: int) -> int:
        """All layers that go are one block."""
        return max(remove, 1)

    @property
    def looks_at(self) -> slice:
        """The last token of each window, or all."""
        return slice(-1, None) if self.tokens == "last" else slice(None)

    def open(self, device: torch.device) -> LayerAccumulator:
        """Start the sums of one block, the last layer of which runs on this device."""
        return _Angles(device)


class _Angles(LayerAccumulator):
    def __init__(self, device: torch.device) -> None:
        import torch

        self.total_and_tokens = torch.zeros(2, dtype=torch.float64, device=device)

    def sums(self) -> list[Tensor]:
        return [self.total_and_tokens]

    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        before_BLD, after_BLD = hidden_BLD.double(), output_BLD.double()
        norms_BL = before_BLD.norm(dim=-1) * after_BLD.norm(dim=-1)
        cosine_BL = (before_BLD * after_BLD).sum(-1) / norms_BL.clamp_min(1e-30)
        self.total_and_tokens[0] += (cosine_BL.clamp(-1, 1).acos() / math.pi).sum()
        self.total_and_tokens[1] += cosine_BL.numel()

    def score(self) -> Tensor:
        return (self.total_and_tokens[0] / self.total_and_tokens[1]).float()
