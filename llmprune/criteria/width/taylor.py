"""First-order Taylor estimate of the loss change when the neuron is removed (LLM-Pruner, arXiv 2305.11627).

    score of neuron f = mean over tokens of | Σ over a window's tokens of x_f · ∂loss/∂x_f |

x_f is the neuron's activation, the loss the next-token cross entropy. Summed over the tokens, x_f · ∂loss/∂x_f equals
Σ over outputs d of w_df · ∂loss/∂w_df: the group's first-order term of LLM-Pruner. ``absolute`` sets the sums within
which tokens may cancel out: each token alone, the tokens of a window, or all of them as in the paper. The last is the
worst: SmolLM2-135M with half its neurons removed by it had perplexity 101 on Wikipedia where the others had 76 and 79
(eval/benchmarks/width.py).

Shapes: B batch, L sequence length, D hidden size, F neurons of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.common.linalg.precision import in_float64
from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.base import UnitInput, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor

Absolute = Literal["token", "window", "all"]


class Taylor(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: taylor, absolute: window}}``."""

    requires: ClassVar[UnitInput] = "activation_times_gradient"
    cost_note: ClassVar[str | None] = (
        "needs a backward pass through all layers, which takes about as long as 3 more forward passes"
    )
    routed_refusal: ClassVar[str | None] = "gradients are not computed inside routed experts"

    kind: Literal["taylor"] = "taylor"
    absolute: Absolute = Field(
        "window",
        description="Of `taylor`: tokens to sum a neuron's effects on the loss over before the sign is dropped.",
    )

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        return _LossChange(self.absolute, output_DF)


class _LossChange(UnitAccumulator):
    def __init__(self, absolute: Absolute, output_DF: Tensor) -> None:
        self.absolute = absolute
        self.sum_F = in_float64(output_DF.new_zeros(output_DF.shape[1]))
        self.tokens = self.sum_F.new_zeros(1)

    def reducible_state(self) -> list[Tensor]:
        return [self.sum_F, self.tokens]

    def update(self, values_BLF: Tensor) -> None:
        change_BLF = values_BLF.float()
        if self.absolute == "token":
            change_BLF = change_BLF.abs()
        change_BF = change_BLF.sum(1)
        if self.absolute == "window":
            change_BF = change_BF.abs()
        self.sum_F += in_float64(change_BF).sum(0)
        self.tokens += values_BLF.shape[:-1].numel()

    def scores(self) -> Tensor:
        return (self.sum_F.abs() / self.tokens.clamp_min(1)).float()
