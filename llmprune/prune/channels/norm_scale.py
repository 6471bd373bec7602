"""Scaling of norms that lose residual channels.

Shapes: B batch, L sequence length, D hidden size, K residual channels kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.common.distributed import sum_over_processes


class NormScale:
    """The factor of a norm's weight with which it makes of the kept channels alone what the wide norm makes of all.

    A norm divides by the root of the mean over all channels it has. The factor is measured on the wide stream: on the
    narrow one least squares shrinks it by the errors that its input has (SmolLM2, 504 of 576 channels, without other
    repairs: KL 1.50 with factors of each channel measured there, 1.00 with √(D/K)).
    """

    def __init__(self, norm: nn.Module, keep_K: Tensor) -> None:
        self._norm, self._keep_K = norm, keep_K
        self._sums_2 = torch.zeros(2, device=next(norm.parameters()).device)

    def see(self, _: nn.Module, args: tuple[Tensor, ...], output_BLD: Tensor) -> None:
        """Add the input and the output of the wide norm: a forward hook."""
        input_BLD = args[0]
        keep_K = self._keep_K.to(input_BLD.device)
        shift = getattr(self._norm, "bias", None)
        shift_K = 0.0 if shift is None else shift.float()
        wide_BLK = output_BLD.index_select(-1, keep_K).float() - shift_K
        narrow_BLK = self._norm(input_BLD.index_select(-1, keep_K)).float() - shift_K
        self._sums_2 += torch.stack([(narrow_BLK * wide_BLK).sum(), narrow_BLK.square().sum()])

    def factor(self) -> float:
        """Return the factor that minimises the squared difference; 1 for a norm that was not called."""
        sum_over_processes([self._sums_2])
        product, square = self._sums_2.tolist()
        return product / square if square > 0 and product > 0 else 1.0
