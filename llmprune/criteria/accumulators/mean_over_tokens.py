"""Means over tokens of one or several quantities, summed in float64.

Shapes: B batch, L sequence length, D hidden size, N quantities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.common.linalg.precision import float64_device, float64_sum
from llmprune.criteria.accumulators.base import Accumulator

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MeanOverTokens(Accumulator):
    """Means of N quantities, each over its own tokens."""

    def __init__(self, device: torch.device, quantities: int = 1) -> None:
        import torch

        self.total_N, self.tokens_N = torch.zeros(2, quantities, dtype=torch.float64, device=float64_device(device))

    def reducible_state(self) -> list[Tensor]:
        """Return the sums and the numbers of tokens, float64 [N] each."""
        return [self.total_N, self.tokens_N]

    def add(self, value_BL: Tensor, quantity: int = 0) -> None:
        """Add one value of a quantity for each token."""
        self.total_N[quantity] += float64_sum(value_BL)
        self.tokens_N[quantity] += value_BL.numel()

    def means(self) -> Tensor:
        """Return the mean of each quantity, float64 [N]; 0 before its first token."""
        means_N: Tensor = self.total_N / self.tokens_N.clamp_min(1)
        return means_N


def cosine(one_BLD: Tensor, other_BLD: Tensor) -> Tensor:
    """Return the cosine between the vectors of each token [B, L], in the precision of the inputs."""
    norms_BL = one_BLD.norm(dim=-1) * other_BLD.norm(dim=-1)
    cosine_BL: Tensor = (one_BLD * other_BLD).sum(-1) / norms_BL.clamp_min(1e-30)
    return cosine_BL
