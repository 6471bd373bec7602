"""Relative error of hidden states, summed over batches and processes.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import math

from torch import Tensor

from llmprune.common.linalg.device_sums import DeviceSums


class RelativeError:
    """Root of the mean over tokens of ‖difference‖² / ‖reference‖²."""

    def __init__(self) -> None:
        self._total_and_tokens = DeviceSums(2)

    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves, which several processes add up in place."""
        return self._total_and_tokens.reducible_state()

    def update(self, difference_BLD: Tensor, reference_BLD: Tensor) -> None:
        """Add the tokens of a batch."""
        reference_BL = reference_BLD.to(difference_BLD.device).float().square().sum(-1).clamp_min(1e-30)
        ratio_BL = difference_BLD.float().square().sum(-1) / reference_BL
        self._total_and_tokens.add(0, ratio_BL)
        self._total_and_tokens.count(1, ratio_BL.numel())

    def value(self) -> float:
        """Return the error of all batches so far; 0 before the first."""
        total, tokens = self._total_and_tokens.read()
        return math.sqrt(total / max(tokens, 1))
