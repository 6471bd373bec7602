"""Kullback–Leibler divergence from the dense model's predictions without the layer.

    score of layer l = mean over tokens of KL( dense model's next-token distribution ‖ that without layer l )

As ``perplexity`` does, with the dense model in the place of the text: it asks for what the model said before,
also where the text is a surprise to both. One layer after the other (``greedy``) after SLEB, arXiv 2402.09025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.base import TrialCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(TrialCriterion):
    """``depth: {remove: 6, criterion: {kind: divergence, windows: 8, greedy: true}}``."""

    kind: Literal["divergence"] = "divergence"

    def cost(self, logits_BLV: Tensor, dense_BLV: Tensor, *, ids_BL: Tensor) -> Tensor:
        """Divergence at each token but the last, as for the cross entropy."""
        return kl_divergence(dense_BLV[:, :-1], logits_BLV[:, :-1])
