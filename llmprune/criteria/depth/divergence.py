"""Kullback–Leibler divergence from the dense model's predictions without the layer.

    score of layer l = mean over tokens of KL( dense model's next-token distribution ‖ that without layer l )

As ``perplexity``, with the dense model's predictions in place of the text: it measures what the removal changes, also
on tokens that neither model predicts well. Greedy removal follows SLEB, arXiv 2402.09025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.base import AblationCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(AblationCriterion):
    """``depth: {remove: 6, criterion: {kind: divergence, windows: 8, greedy: true}}``."""

    kind: Literal["divergence"] = "divergence"

    def token_costs(self, logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
        """Return the divergence of the distributions of each next token."""
        return kl_divergence(dense_BPV, logits_BPV)
