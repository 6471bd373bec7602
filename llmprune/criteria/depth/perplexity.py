"""Perplexity without the layer: Shortened LLaMA, arXiv 2402.02834, and greedily SLEB, arXiv 2402.09025.

    score of layer l = mean next-token cross entropy of the model without layer l, less that of the dense model

With ``greedy``, as in SLEB, layers are removed one by one and the rest is scored anew; without, each layer is scored
by its removal from the dense model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.ablation import AblationCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Perplexity(AblationCriterion):
    """``depth: {remove: 6, criterion: {kind: perplexity, windows: 8, greedy: true}}``."""

    kind: Literal["perplexity"] = "perplexity"

    def token_costs(self, logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
        """Return the cross entropy of each next token."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits_BPV.float().transpose(1, 2), targets_BP, reduction="none")
