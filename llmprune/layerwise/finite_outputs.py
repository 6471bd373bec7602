"""Check that the outputs of a layer are finite, without a wait for the device in every batch.

Shapes: B batch, L sequence length, D hidden size, N batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.common.errors import NumericalError


class FiniteOutputs:
    """Least and largest value of a layer's output in every batch; they are on the device until ``require`` reads them.

    The extremes of finite values are finite, whereas their sum may overflow.
    """

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._extremes: list[Tensor] = []

    def add(self, output_BLD: Tensor) -> None:
        """Add the output for the next batch."""
        self._extremes += torch.aminmax(output_BLD.detach())

    def require(self) -> None:
        """Raise NumericalError, which names the first batch with NaN or infinity, if there is one."""
        if not self._extremes:
            return
        finite_N = torch.stack(self._extremes).isfinite().view(-1, 2).all(1).tolist()
        if not all(finite_N):
            raise NumericalError(
                f"layer {self._layer} returns NaN or infinity for calibration batch {finite_N.index(False)}; "
                "try model.dtype: float32 or bfloat16, and check the checkpoint's weights"
            )
