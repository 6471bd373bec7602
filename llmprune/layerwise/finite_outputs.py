"""Check that the outputs of a layer are finite, without a wait for the device in every batch.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.common.errors import NumericalError


class FiniteOutputs:
    """Number of batches before the first whose output has NaN or infinity, on the device until ``require`` reads it.

    An output is finite if its least and largest value are; a sum of finite values may overflow.
    """

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._batches = 0
        self._finite: Tensor | None = None  # True while all outputs were finite
        self._before: Tensor | None = None

    def add(self, output_BLD: Tensor) -> None:
        """Add the output for the next batch."""
        finite = torch.stack(torch.aminmax(output_BLD.detach())).isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        self._before = self._finite.int() if self._before is None else self._before + self._finite
        self._batches += 1

    def require(self) -> None:
        """Raise NumericalError, which names the first batch with NaN or infinity, if there is one."""
        before = self._batches if self._before is None else int(self._before)
        if before < self._batches:
            raise NumericalError(
                f"layer {self._layer} returns NaN or infinity for calibration batch {before}; "
                "try model.dtype: float32 or bfloat16, and check the checkpoint's weights"
            )
