"""The fixed numbers of a training: its steps, the windows of each, and the learning rate of each.

Shapes: S steps, W windows of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llmprune.recipe.recover import Recover

_LAST_RATE = 0.1  # learning rate at the end, relative to the highest


@dataclass(frozen=True)
class Course:
    """Steps of a training. ``order_SW``: the windows of each step, int64; ``rate``: the highest learning rate."""

    order_SW: Tensor
    rate: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup: float
    between_checks: int

    @classmethod
    def of(cls, settings: Recover, order_W: Tensor, *, windows_of_step: int, hidden_size: int) -> Course:
        """Return the course over windows in this order, as many whole steps as they fill."""
        steps = len(order_W) // windows_of_step
        order_SW = order_W[: steps * windows_of_step].view(steps, windows_of_step)
        checks = settings.steps_between_checks(steps)
        return cls(order_SW, settings.rate(hidden_size), settings.schedule, settings.warmup, checks)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.order_SW)

    def rate_of(self, step: int) -> float:
        """Return the learning rate of a step."""
        warm = max(math.ceil(self.warmup * self.steps), 1)
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(self.steps - warm, 1)
        fall = {"cosine": (1 - math.cos(math.pi * done)) / 2, "linear": done, "constant": 0.0}[self.schedule]
        return self.rate * (1 - (1 - _LAST_RATE) * fall)

    def is_check(self, step: int) -> bool:
        """Check whether the model is measured after so many steps."""
        return step % self.between_checks == 0 or step == self.steps
