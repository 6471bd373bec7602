"""Base classes of accumulators: running sums over calibration tokens that end with scores.

Shapes: B batch, L sequence length, T tokens, D hidden size, F neurons of a unit, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


class Accumulator(ABC):
    """Sums over tokens that can be added up over several processes."""

    @abstractmethod
    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves: adding to them in place adds to the accumulator."""


A = TypeVar("A", bound=Accumulator)


def pooled(accumulators: Sequence[A], weights: Sequence[float]) -> list[A]:
    """Add the sums of all to those of the first, each times its weight, of which the first is 1; return it alone."""
    first, *others = accumulators
    for other, weight in zip(others, weights[1:], strict=True):
        for total, own in zip(first.reducible_state(), other.reducible_state(), strict=True):
            total.add_(own, alpha=weight)
    return [first]


class LayerAccumulator(Accumulator):
    """Score of one decoder layer, or of a span of consecutive layers, from the hidden states before and after it."""

    @abstractmethod
    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        """Add a batch of hidden states before and after the layer."""

    @abstractmethod
    def score(self) -> Tensor:
        """Return the importance of the layer, a float32 scalar; the lowest are removed first."""


class UnitAccumulator(Accumulator):
    """Scores of the neurons of one unit, from what the criterion requires at the inputs of its output projection."""

    @abstractmethod
    def update(self, values_BLF: Tensor) -> None:
        """Add a batch of activations, or of their products with gradients; of routed experts [T, F]."""

    def update_with(self, values_BLF: Tensor, written_BLD: Tensor) -> None:
        """Add a batch of activations together with the outputs of the projection, less its bias."""
        self.update(values_BLF)

    @abstractmethod
    def scores(self) -> Tensor:
        """Return the importance of each neuron, float32 [F]; the lowest are removed first."""

    def group_scores(self, size: int) -> Tensor:
        """Return the importance of each group of ``size`` neighbouring inputs of the projection, float32 [F / size]."""
        return self.scores().float().view(-1, size).sum(1)


class ExpertAccumulator(Accumulator):
    """Scores of the experts of one layer, from what each adds to the hidden states of its tokens."""

    @abstractmethod
    def update(self, expert: int, added_TD: Tensor) -> None:
        """Add an expert's outputs times the router's weights, for the tokens that are routed to it."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Return the importance of each expert, float32 [E]; the lowest are removed first."""
