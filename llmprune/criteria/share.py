"""Share of what the projection writes, token by token: our own.

    score of neuron f = mean over tokens of x_f² · ‖ column f of the output projection ‖² / ‖ x Wᵀ ‖²

``activation`` with the energy that is written for each token set to one. Few tokens hold most of the energy (the first
of a window, delimiters), and a kind of text has its own loud ones; here each token says the same, so that scores hang
less on the text that they were taken from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from llmprune.criteria.base import UnitAccumulator, WidthCriterion
from llmprune.criteria.moments import MeanSquare

if TYPE_CHECKING:
    from torch import Tensor


class Share(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: share}}``."""

    cost: ClassVar[str | None] = "takes one more product with each output projection in pass 1"

    kind: Literal["share"] = "share"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return _Share(output_DF)


class _Share(MeanSquare):
    def __init__(self, output_DF: Tensor) -> None:
        super().__init__(output_DF.float().square().sum(0))
        self.output_DF = output_DF

    def update(self, values_BLF: Tensor) -> None:
        values_TF = values_BLF.flatten(0, -2).float()
        energy_T1 = (values_TF @ self.output_DF.float().T).square().sum(-1, keepdim=True)
        written_T1 = energy_T1.where(energy_T1 > 0, 1)  # nothing is written: nobody has a share
        super().update(values_TF / written_T1.sqrt())

    def scores(self) -> Tensor:
        return self.mean() * self.per_neuron_F
