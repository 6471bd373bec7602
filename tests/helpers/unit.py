"""A gated unit with random weights, activations and gradients, which width criteria score.

Shapes: B batch, L sequence length, D hidden size, F neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.base import WidthCriterion

WINDOWS, LENGTH, HIDDEN, NEURONS = 6, 10, 5, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random values of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Unit:
    """Weights of a gated unit, its neurons' activations, and the gradient of a loss after its output projection."""

    def __init__(self) -> None:
        self.inputs = [normal(NEURONS, HIDDEN, seed=1), normal(NEURONS, HIDDEN, seed=2), normal(NEURONS, seed=3)]
        self.output_DF = normal(HIDDEN, NEURONS, seed=4)
        mixed_FF = normal(NEURONS, NEURONS, seed=5)
        self.activation_BLF = (normal(WINDOWS, LENGTH, NEURONS, seed=6) + 0.5) @ mixed_FF
        self.gradient_BLD = normal(WINDOWS, LENGTH, HIDDEN, seed=7)

    def neurons(self, order_F: Tensor) -> Unit:
        """Reorder the neurons, and return the unit."""
        self.inputs = [rows[order_F] for rows in self.inputs]
        self.output_DF = self.output_DF[:, order_F]
        self.activation_BLF = self.activation_BLF[..., order_F]
        return self

    def accumulate(self, criterion: WidthCriterion, windows: slice, batch: int = 2) -> UnitAccumulator:
        """Accumulator of the criterion after some windows."""
        accumulator = criterion.make_accumulator(self.output_DF, self.inputs)
        values_BLF = self.activation_BLF
        if criterion.needs_gradients:
            values_BLF = values_BLF * (self.gradient_BLD @ self.output_DF)
        for values in values_BLF[windows].split(batch):
            accumulator.update(values)
        return accumulator

    def scores(self, criterion: WidthCriterion, batch: int = 2) -> Tensor:
        """Scores by all windows."""
        return self.accumulate(criterion, slice(None), batch).scores()
