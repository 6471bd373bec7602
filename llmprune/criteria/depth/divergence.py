"""Kullback–Leibler divergence from the dense model's predictions without the layer.

    score of layer l = mean over tokens of KL( dense model's next-token distribution ‖ that without layer l )

As ``perplexity``, with the dense model's predictions in place of the text: it measures what the removal changes, also
on tokens that neither model predicts well. Layers that cost least alone may cost more together than consecutive ones,
which arXiv 2403.17887 removes and one refit can replace: each span is judged beside them, all together. Of those that
cost little more than the cheapest, the layers go that turn what the head reads least (``turns_of``), as a repair has
least to make up for. ``greedy`` follows SLEB, arXiv 2402.09025, but that few windows do not tell all layers apart: only
those are ablated again that were cheap at first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.ablation import AblationCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Divergence(AblationCriterion):
    """``depth: {remove: 6, criterion: {kind: divergence, windows: 8, tokens: 256, spans: true}}``."""

    kind: Literal["divergence"] = "divergence"
    greedy: bool = Field(False, description=AblationCriterion.model_fields["greedy"].description)
    candidates: int | None = Field(3, gt=0, description=AblationCriterion.model_fields["candidates"].description)
    tokens: int | None = Field(256, gt=1, description=AblationCriterion.model_fields["tokens"].description)
    spans: bool = Field(
        True,
        description="Judge all spans of as many consecutive layers too, each removed together, beside the layers with "
        "the lowest scores. Of those that cost little more than the cheapest, the ones go that turn the hidden states "
        "least.",
    )

    def judges_spans(self, remove: int) -> bool:
        """Return True where spans of several layers are judged."""
        return self.spans and remove > 1

    def token_costs(self, logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
        """Return the divergence of the distributions of each next token."""
        return kl_divergence(dense_BPV, logits_BPV)
