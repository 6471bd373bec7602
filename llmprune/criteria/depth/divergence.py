"""Kullback–Leibler divergence from the dense model's predictions without the layer.

    score of layer l = mean over tokens of KL( dense model's next-token distribution ‖ that without layer l )

As ``perplexity``, with the dense model's predictions in place of the text: it measures what the removal changes, also
on tokens that neither model predicts well. Greedy removal follows SLEB, arXiv 2402.09025, but that few windows do not
tell all layers apart: only those are ablated again that were cheap at first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.ablation import AblationCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(AblationCriterion):
    """``depth: {remove: 6, criterion: {kind: divergence, windows: 8, candidates: 6, tokens: 256}}``."""

    kind: Literal["divergence"] = "divergence"
    candidates: int | None = Field(6, gt=0, description=AblationCriterion.model_fields["candidates"].description)
    tokens: int | None = Field(256, gt=1, description=AblationCriterion.model_fields["tokens"].description)

    def token_costs(self, logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
        """Return the divergence of the distributions of each next token."""
        return kl_divergence(dense_BPV, logits_BPV)
