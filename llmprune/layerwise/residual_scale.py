"""How far a stream is from where it should be, and how a projection's output reaches it.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmprune.layerwise.forward import LayerwiseForward


class RelativeError:
    """Root of the mean over tokens of ‖difference‖² / ‖target‖²."""

    def __init__(self) -> None:
        self._total_and_tokens = torch.zeros(2, dtype=torch.float64)

    def sums(self) -> list[Tensor]:
        """The running sums, for several processes to add up."""
        return [self._total_and_tokens]

    def update(self, difference_BLD: Tensor, target_BLD: Tensor) -> None:
        """Take in a batch."""
        target_BL = target_BLD.to(difference_BLD.device).float().square().sum(-1).clamp_min(1e-30)
        ratio_BL = difference_BLD.float().square().sum(-1) / target_BL
        self._total_and_tokens[0] += float(ratio_BL.double().sum())
        self._total_and_tokens[1] += ratio_BL.numel()

    def value(self) -> float:
        """The error so far; 0 before the first batch."""
        total, tokens = self._total_and_tokens.tolist()
        return math.sqrt(total / max(tokens, 1))


def residual_scale(walk: LayerwiseForward, index: int, *, layer: nn.Module, output: nn.Module) -> float | None:
    """How much of a projection's output reaches the hidden states: a factor, or None if not linearly.

    Found by adding noise to the projection's output in a run of the walk's first batch.
    """
    hidden_BLD = walk.streams[0].to(walk.decoder.device_of(index))
    call = walk.calls[0][index]
    before_BLD = call.run(layer, hidden_BLD).float()
    noise_BLD = torch.randn(before_BLD.shape, generator=torch.Generator().manual_seed(0)).to(before_BLD)
    noise_BLD *= before_BLD.norm() / noise_BLD.norm()
    handle = output.register_forward_hook(lambda _, __, value: value + noise_BLD.to(value.dtype).view(value.shape))
    try:
        change_BLD = call.run(layer, hidden_BLD).float() - before_BLD
    finally:
        handle.remove()
    scale = float((change_BLD * noise_BLD).sum() / noise_BLD.square().sum())
    off = float((change_BLD - scale * noise_BLD).norm() / noise_BLD.norm())
    if not (abs(scale) >= 1e-3 and off <= 0.05 * abs(scale)):  # NaN of silent outputs is no factor either
        return None
    return 1.0 if abs(scale - 1) < 0.01 else scale
