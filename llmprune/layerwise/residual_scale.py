"""Measurement of how the output of a projection reaches the residual stream.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hooks import changed_output


def residual_scale(forward: LayerwiseForward, index: int, *, layer: nn.Module, output: nn.Module) -> float | None:
    """Measure the factor by which a projection's output is added to the hidden states after its layer.

    Found by adding noise to the output of the projection ``output`` in a run of the first batch. Returns None if the
    hidden states do not depend on it linearly (a norm follows) or hardly at all.
    """
    hidden_BLD = forward.hidden_states.at(0, forward.decoder.device_of(index))
    call = forward.calls[0][index]
    before_BLD = call.run(layer, hidden_BLD).float()
    noise_BLD = torch.randn(before_BLD.shape, generator=torch.Generator().manual_seed(0)).to(before_BLD)
    noise_BLD *= before_BLD.norm() / noise_BLD.norm()

    def add_noise(value: Tensor) -> Tensor:
        return value + noise_BLD.to(value.dtype).view(value.shape)

    with changed_output(output, add_noise):
        change_BLD = call.run(layer, hidden_BLD).float() - before_BLD
    scale = float((change_BLD * noise_BLD).sum() / noise_BLD.square().sum())
    nonlinear = float((change_BLD - scale * noise_BLD).norm() / noise_BLD.norm())
    if not (abs(scale) >= 1e-3 and nonlinear <= 0.05 * abs(scale)):  # also for NaN, which hidden states of zeros give
        return None
    return 1.0 if abs(scale - 1) < 0.01 else scale
