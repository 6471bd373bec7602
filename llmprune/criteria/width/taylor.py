"""First-order Taylor: what the loss would change by if the neuron were gone (LLM-Pruner, arXiv 2305.11627).

    score of neuron f = mean over tokens of | Σ over a window's tokens of x_f · ∂loss/∂x_f |

x_f is the neuron's activation, the loss the next-token cross entropy. Summed over the tokens,
x_f · ∂loss/∂x_f equals Σ over outputs d of w_df · ∂loss/∂w_df: the group's first-order term
of LLM-Pruner. ``absolute`` says within what sums tokens may cancel out: each token counts
by itself, or the tokens of a window together, or all of them as in the paper, which is the worst: half the neurons
of SmolLM2-135M kept by it had perplexity 101 on Wikipedia where the others had 76 and 79 (eval/benchmarks/width.py).

Shapes: B batch, L sequence length, F neurons of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.criteria.base import Sees, UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor

Absolute = Literal["token", "window", "all"]


class Taylor(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: taylor, absolute: window}}``."""

    takes: ClassVar[Sees] = "effects"
    cost: ClassVar[str | None] = (
        "goes back through all layers for gradients, which takes about as long as 3 more forward passes"
    )
    routed_refusal: ClassVar[str | None] = "gradients are not watched inside of routed experts"

    kind: Literal["taylor"] = "taylor"
    absolute: Absolute = Field(
        "window",
        description="Of `taylor`: what a neuron's effects on the loss are added up over before their sign is dropped.",
    )

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return _Effects(self.absolute, output_DF)


class _Effects(UnitAccumulator):
    def __init__(self, absolute: Absolute, output_DF: Tensor) -> None:
        self.absolute = absolute
        self.sum_F = output_DF.new_zeros(output_DF.shape[1]).double()
        self.tokens = self.sum_F.new_zeros(1)

    def sums(self) -> list[Tensor]:
        return [self.sum_F, self.tokens]

    def update(self, values_BLF: Tensor) -> None:
        effect_BLF = values_BLF.float()
        if self.absolute == "token":
            effect_BLF = effect_BLF.abs()
        effect_BF = effect_BLF.sum(1)
        if self.absolute == "window":
            effect_BF = effect_BF.abs()
        self.sum_F += effect_BF.double().sum(0)
        self.tokens += values_BLF.shape[:-1].numel()

    def scores(self) -> Tensor:
        return (self.sum_F.abs() / self.tokens.clamp_min(1)).float()
