"""Block influence: ShortGPT, arXiv 2403.03853, equation 1.

    BI = 1 − mean over tokens of cos(hidden before the layer, hidden after it)

A layer that hardly turns the hidden states can go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.base import DepthCriterion, LayerAccumulator

if TYPE_CHECKING:
    from torch import Tensor


class BlockInfluence(DepthCriterion):
    """``depth: {remove: 6, criterion: {kind: block_influence}}``."""

    kind: Literal["block_influence"] = "block_influence"

    def open(self) -> LayerAccumulator:
        """Start the sums of one layer."""
        return _Cosines()


class _Cosines(LayerAccumulator):
    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.tokens = 0

    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        before_BLD, after_BLD = hidden_BLD.float(), output_BLD.float()
        norms_BL = before_BLD.norm(dim=-1) * after_BLD.norm(dim=-1)
        cosine_BL = (before_BLD * after_BLD).sum(-1) / norms_BL.clamp_min(1e-30)
        batch_total = cosine_BL.double().sum()
        self.total = batch_total if self.total is None else self.total + batch_total
        self.tokens += cosine_BL.numel()

    def score(self) -> Tensor:
        assert self.total is not None, "a layer is scored after at least one batch"
        return (1 - self.total / self.tokens).float()
