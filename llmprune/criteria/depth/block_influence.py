"""Block influence: ShortGPT, arXiv 2403.03853, equation 1.

    BI = 1 − mean over tokens of cos(hidden states before the layer, hidden states after it)

The layers that rotate the hidden states least are removed first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.base import LayerAccumulator
from llmprune.criteria.accumulators.mean_over_tokens import MeanOverTokens, cosine
from llmprune.criteria.base import HiddenStateCriterion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BlockInfluence(HiddenStateCriterion):
    """``depth: {remove: 6, criterion: {kind: block_influence}}``."""

    kind: Literal["block_influence"] = "block_influence"

    def make_accumulator(self, device: torch.device) -> LayerAccumulator:
        """Return the empty accumulator of one layer."""
        return _Cosines(device)


class _Cosines(MeanOverTokens, LayerAccumulator):
    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        self.add(cosine(hidden_BLD.float(), output_BLD.float()))

    def score(self) -> Tensor:
        return (1 - self.means()[0]).float()
