"""Base classes of the importance criteria.

A criterion is a frozen section of the recipe: its parameters. It makes one accumulator for every layer or prunable
unit that it scores. To add a criterion, add a file to ``depth``, ``width`` or ``experts`` with a subclass that
declares its ``kind``; nothing else changes.

Shapes: D hidden size, F neurons of a unit, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from llmprune.common.variants import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.criteria.accumulators.base import ExpertAccumulator, LayerAccumulator, UnitAccumulator


UnitInput = Literal["activations", "activation_times_gradient", "relative_activation_times_gradient"]


@dataclass(frozen=True)
class ScoringSize:
    """Sizes that the memory of scoring layers depends on, as they are known before a run.

    ``remove``: number of layers to remove. ``samples``: calibration windows, of ``length`` tokens each. ``inputs``:
    inputs of the widest output projection of an MLP. ``itemsize``: bytes of one value of the hidden states.
    """

    layers: int
    remove: int
    samples: int
    length: int
    hidden: int
    inputs: int
    itemsize: int

    @property
    def window_bytes(self) -> int:
        """Bytes of the hidden states of one calibration window."""
        return self.length * self.hidden * self.itemsize


@dataclass(frozen=True)
class AblationCost:
    """Time that ablation takes; ``forward_passes``: in forward passes over all calibration tokens.

    ``windows``: that models without a layer are evaluated on, of ``length`` tokens each; the last ``predicted`` of each
    are predicted. ``models``: those that predict them, in all rounds together, the dense one included.
    """

    rounds: int
    windows: int
    length: int
    predicted: int
    models: int
    forward_passes: float
    refits: bool = False


class DepthCriterion(Variant, ABC):
    """Scores decoder layers: a ``HiddenStateCriterion`` or an ``AblationCriterion``.

    What a plan has to know of a criterion it asks by the methods here; their defaults add nothing. ``in_pass1``: pass 1
    scores the layers; others are scored after it, so that its scores serve again where these do not.
    """

    needs_kind: ClassVar[bool] = False
    in_pass1: ClassVar[bool] = True

    @abstractmethod
    def horizon(self, remove: int) -> int:
        """Return the number of removed layers that the scores depend on: ``remove``, or 1 where they do not."""

    def scaled(self, part: int, whole: int) -> Self:
        """Return the criterion for ``part`` windows of a calibration of ``whole`` windows that it was meant for."""
        return self

    def require_samples(self, samples: int) -> None:
        """Raise CalibrationError where the number of calibration samples is too small for the criterion."""

    def require_sources(self, windows: Sequence[int]) -> None:
        """Raise CalibrationError where the criterion evaluates on no window of a source. ``windows``: of each."""

    def hidden_state_bytes(self, size: ScoringSize) -> int:
        """Return the bytes of hidden states kept in addition to the dense and pruned ones of all windows."""
        return 0

    def statistics_bytes(self, size: ScoringSize) -> int:
        """Return the bytes of sums and factors, where they are many."""
        return 0

    def ablation_cost(self, layers: int, *, remove: int, windows: int, length: int) -> AblationCost | None:
        """Return the time that ablation takes in addition to pass 1; None without ablation.

        ``windows``: of the calibration, of ``length`` tokens each.
        """
        return None


class HiddenStateCriterion(DepthCriterion):
    """Scores spans of consecutive layers from the hidden states before and after them, during pass 1."""

    def horizon(self, remove: int) -> int:
        """Return the number of consecutive layers that are scored as one."""
        return 1

    @property
    def token_slice(self) -> slice:
        """Tokens of each window that the criterion reads."""
        return slice(None)

    def hidden_state_bytes(self, size: ScoringSize) -> int:
        """Return the bytes of the hidden states kept from before each layer of a span of several layers."""
        span = self.horizon(size.remove)
        if span < 2:
            return 0
        tokens = len(range(size.length)[self.token_slice])
        return span * size.samples * size.window_bytes * tokens // size.length

    @abstractmethod
    def make_accumulator(self, device: torch.device) -> LayerAccumulator:
        """Return the empty accumulator of one span of layers, the last of which is computed on this device."""


class WidthCriterion(Variant, ABC):
    """Scores the neurons of an MLP, and key-value groups by the inputs of their output projection.

    ``requires``: what its accumulators read of each token: the activations of pass 1's forward pass, or their
    products with the gradient of the loss, activation · ∂loss/∂activation, for which pass 1 needs a backward pass;
    relative products are divided by the norm of the token's ∂loss/∂(hidden states after the layer).
    ``cost_note``: what scoring costs in addition to the forward pass, for the plan.
    ``routed_refusal``: why it cannot score the neurons of routed experts.
    ``assumes_refit``: its scores are meaningful only if the cut is refit.
    ``is_additive``: the scores of several neurons add up to their importance together.
    """

    requires: ClassVar[UnitInput] = "activations"
    cost_note: ClassVar[str | None] = None
    routed_refusal: ClassVar[str | None] = None
    assumes_refit: ClassVar[bool] = False
    is_additive: ClassVar[bool] = True

    @property
    def needs_gradients(self) -> bool:
        """True where pass 1 needs a backward pass."""
        return self.requires != "activations"

    @property
    def forward_criterion(self) -> WidthCriterion | None:
        """Criterion that scores in pass 1's forward pass; None where all scores come from the backward pass.

        One that needs gradients as well does without them where there are none.
        """
        return None if self.needs_gradients else self

    def windows_for_gradients(self, windows: int, generated: int) -> int:
        """Return the number of calibration windows that have a backward pass.

        ``windows``: all of them; ``generated``: those that the dense model writes itself.
        """
        return windows if self.needs_gradients else 0

    def blended(self, forward_F: Tensor, gradient_F: Tensor) -> Tensor:
        """Return the scores of a unit from those of its forward and of its backward pass, where it has both."""
        raise NotImplementedError

    @abstractmethod
    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection.

        ``inputs``: the unit's other tensors, one row a neuron [F, …], for criteria that read all its weights.
        """

    def for_tokens(self, tokens: int) -> Self:
        """Return the criterion for a number of calibration tokens; with more tokens it may compute less of each."""
        return self

    def operations(self, width: int) -> int:
        """Return the float64 operations that scoring a unit of this width takes, where they are many."""
        return 0

    def token_operations(self, width: int, hidden: int) -> float:
        """Return the operations that scoring a unit of this width takes for each token, where they are many."""
        return 0.0

    def memory(self, width: int, sources: int = 1) -> int:
        """Return the most bytes that scoring a unit of this width takes in addition to the layer, where it is much.

        ``sources``: number of text sources whose sums are kept apart.
        """
        return 0


class ExpertCriterion(Variant, ABC):
    """Scores the experts of a mixture."""

    needs_kind: ClassVar[bool] = False

    @abstractmethod
    def make_accumulator(self, experts: int, device: torch.device) -> ExpertAccumulator:
        """Return the empty accumulator of one layer's experts, which are computed on this device."""
