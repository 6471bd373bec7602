"""Angular distance of spans of layers: The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887.

    d(l, n) = mean over sequences of arccos( cos( hidden before layer l, hidden before layer l + n ) ) / π

of the last token, as in the paper, or of all tokens. The n consecutive layers that rotate the hidden states
least are removed together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from llmprune.common.linalg.precision import in_float64
from llmprune.criteria.accumulators.base import LayerAccumulator
from llmprune.criteria.accumulators.mean_over_tokens import MeanOverTokens, cosine
from llmprune.criteria.base import HiddenStateCriterion

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Angular(HiddenStateCriterion):
    """``depth: {remove: 6, criterion: {kind: angular}}``."""

    kind: Literal["angular"] = "angular"
    tokens: Literal["last", "all"] = Field("last", description="Tokens of each window whose angle is measured.")

    def horizon(self, remove: int) -> int:
        """Return the length of the span: all layers to remove."""
        return max(remove, 1)

    @property
    def token_slice(self) -> slice:
        """Select the last token of each window, or all."""
        return slice(-1, None) if self.tokens == "last" else slice(None)

    def make_accumulator(self, device: torch.device) -> LayerAccumulator:
        """Return the empty accumulator of one span."""
        return _Angles(device)


class _Angles(MeanOverTokens, LayerAccumulator):
    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        cosine_BL = cosine(in_float64(hidden_BLD), in_float64(output_BLD))
        self.add(cosine_BL.clamp(-1, 1).acos() / math.pi)

    def score(self) -> Tensor:
        return self.means()[0].float()
