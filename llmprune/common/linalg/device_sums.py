"""Sums over batches that stay on the device: adding to them does not make the host wait for the device.

Shapes: N quantities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.common.linalg.precision import float64_sum


class DeviceSums:
    """Sums of N quantities in float64, on the device of the first value, or the CPU where that has no float64."""

    def __init__(self, quantities: int) -> None:
        self._total_N = torch.zeros(quantities, dtype=torch.float64)

    def add(self, quantity: int, value: Tensor) -> None:
        """Add all elements of a value to the sum of a quantity."""
        total = float64_sum(value)
        self._total_N = self._total_N.to(total.device)
        self._total_N[quantity] += total

    def count(self, quantity: int, number: int) -> None:
        """Add a number that the host knows."""
        self._total_N[quantity] += number

    def reducible_state(self) -> list[Tensor]:
        """Return the sums themselves, float64 [N], which several processes add up in place."""
        return [self._total_N]

    def read(self) -> list[float]:
        """Return the sums, after the device has computed them."""
        values: list[float] = self._total_N.tolist()
        return values
