"""What a criterion is.

A criterion is a frozen section of the recipe (its parameters) that opens one
accumulator per layer or unit; the accumulator holds the running sums. Adding a
criterion takes one file here and one line in ``__init__.py``.

Shapes: B batch, L sequence length, T tokens, D hidden size, V vocabulary, F neurons of a unit, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from llmprune.common.variants import Variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Sees = Literal["activations", "effects", "relative effects"]


class Accumulator(ABC):
    """Sums over tokens that several processes can add up."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The running sums themselves; whoever adds to them in place adds to the accumulator."""


class LayerAccumulator(Accumulator):
    """Sees every batch that one decoder layer, or a run of them, transforms, and ends with one number."""

    @abstractmethod
    def update(self, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        """Take in the hidden states before and after the layer."""

    @abstractmethod
    def score(self) -> Tensor:
        """Importance of the layer as a float32 scalar; the lowest are removed first."""


class UnitAccumulator(Accumulator):
    """Sees what its criterion takes of every batch at one unit's output projection, and ends with a score a neuron."""

    @abstractmethod
    def update(self, values_BLF: Tensor) -> None:
        """Take in a batch: the inputs of the unit's output projection, or their effects; of routed experts [T, F]."""

    def update_with(self, values_BLF: Tensor, written_BLD: Tensor) -> None:
        """Take in a batch of inputs where what the projection makes of them, its bias left aside, is at hand."""
        self.update(values_BLF)

    @abstractmethod
    def scores(self) -> Tensor:
        """Importance of each neuron, float32 [F]; the lowest are removed first."""

    def group_scores(self, size: int) -> Tensor:
        """Importance of each group of so many neighbouring inputs of the projection, float32 [F / size]."""
        return self.scores().float().view(-1, size).sum(1)


class ExpertAccumulator(Accumulator):
    """Sees what each expert of one layer adds for its tokens, and ends with a score an expert."""

    @abstractmethod
    def update(self, expert: int, added_TD: Tensor) -> None:
        """Take in the outputs of an expert, times the router's weight, for the tokens routed to it."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Importance of each expert, float32 [E]; the lowest are removed first."""


class DepthCriterion(Variant, ABC):
    """Scores decoder layers: a ``PassingCriterion`` or a ``TrialCriterion``."""

    needs_kind: ClassVar[bool] = False

    @abstractmethod
    def horizon(self, remove: int) -> int:
        """What the scores depend on of the number of layers that go: all of it, or 1."""


class PassingCriterion(DepthCriterion):
    """Scores runs of layers by the hidden states before and after them, as pass 1 goes by."""

    def horizon(self, remove: int) -> int:
        """How many neighbouring layers are scored as one."""
        return 1

    @property
    def looks_at(self) -> slice:
        """The tokens of each window that it is given."""
        return slice(None)

    @abstractmethod
    def open(self, device: torch.device) -> LayerAccumulator:
        """Start the sums of one run of layers, the last of which runs on this device."""


class TrialCriterion(DepthCriterion):
    """Leaves each layer out in turn and judges what the model then says, on some of the windows."""

    windows: int = Field(8, gt=0, description="Calibration windows that the trials run on.")
    greedy: bool = Field(
        True, description="Choose one layer after the other, each without those before it; false: all at once."
    )

    def horizon(self, remove: int) -> int:
        """How many rounds of trials there are."""
        return remove if self.greedy else 1

    def scaled(self, part: int, whole: int) -> Self:
        """The same for so many windows where it is meant for a whole calibration."""
        return self.model_copy(update={"windows": scaled(self.windows, part, whole=whole)})

    @abstractmethod
    def cost(self, logits_BLV: Tensor, dense_BLV: Tensor, *, ids_BL: Tensor) -> Tensor:
        """What each token's prediction costs [B, L-1], float32; ``dense_BLV`` are the dense model's logits."""


def scaled(windows: int, part: int, *, whole: int) -> int:
    """So many windows of a part of the calibration as ``windows`` are of all of it; at least 1."""
    return max(1, windows * part // whole)


class WidthCriterion(Variant, ABC):
    """Scores the neurons of an MLP.

    ``takes``: what its accumulators see of each token: the neurons' activations, which pass 1 meets on its way, or
    their effects: activation · ∂loss/∂activation, for which it goes the way back too; relative ones are over the norm
    of the token's ∂loss/∂hidden states after the layer. ``cost``: what it costs beside the walk, for the plan.
    ``routed_refusal``: why it cannot score neurons that not every token goes through.
    ``assumes_refit``: whether its scores are only worth something if the cut is repaired. ``adds_up``: whether the
    scores of several neurons add up to what they are worth together.
    """

    takes: ClassVar[Sees] = "activations"
    cost: ClassVar[str | None] = None
    routed_refusal: ClassVar[str | None] = None
    assumes_refit: ClassVar[bool] = False
    adds_up: ClassVar[bool] = True

    @abstractmethod
    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection.

        ``inputs``: the unit's other tensors, a neuron a row [F, …], for criteria that look at all its weights.
        """

    def operations(self, width: int) -> int:
        """Products in float64 beside the walk that scoring a unit of this width takes, where they are many."""
        return 0

    def memory(self, width: int) -> int:
        """Most bytes that scoring a unit of this width takes beside the layer, where that is much."""
        return 0


class ExpertCriterion(Variant, ABC):
    """Scores the experts of a mixture."""

    needs_kind: ClassVar[bool] = False

    @abstractmethod
    def open(self, experts: int, device: torch.device) -> ExpertAccumulator:
        """Start the sums of one layer's experts, which run on this device."""
