"""Share of what the projection writes, token by token: our own.

    score of neuron f = mean over tokens of ‖ x_f w_f ‖² / ‖ y ‖² · | cos(w_f, y) |        y = Σ over f of x_f w_f

where w_f is column f of the output projection. It differs from ``activation`` in two ways:

- Every token says the same. Few tokens hold most of the energy (the first of a window, delimiters), and a kind of text
  has its own loud ones; shares of each token's energy hang less on the text that they were taken from.
- A neuron that writes along what the token gets counts for more than one that is cancelled by others. Losses along y
  add up with the number of neurons that go, losses across it with its root.

It takes one more product with each output projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.mean_square import MeanSquare
from llmprune.criteria.base import UnitAccumulator, WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


_STRIP = 512


class Share(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: share}}``."""

    kind: Literal["share"] = "share"

    def open(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Start the sums of one unit with this output projection."""
        return _Share(output_DF)


class _Share(MeanSquare):
    """Products are rounded as the layer's own is; what is made of them is float32."""

    def __init__(self, output_DF: Tensor) -> None:
        super().__init__(output_DF.float().norm(dim=0))
        self.output_DF = output_DF

    def update(self, values_BLF: Tensor) -> None:
        self.update_with(values_BLF, values_BLF @ self.output_DF.T)

    def update_with(self, values_BLF: Tensor, written_BLD: Tensor) -> None:
        values_TF, written_TD = values_BLF.flatten(0, -2), written_BLD.flatten(0, -2)
        for values_SF, written_SD in zip(_strips(values_TF), _strips(written_TD), strict=True):
            norm_S1 = written_SD.float().norm(dim=-1, keepdim=True)
            norm_S1 = norm_S1.where(norm_S1 > 0, math.inf)  # of nothing nobody has a share
            direction_SD = (written_SD.float() / norm_S1).to(values_SF.dtype)
            along_SF = (direction_SD @ self.output_DF).float().abs_()
            self.sum_F += along_SF.mul_((values_SF.float() / norm_S1).square_()).sum(0)
        self.tokens += len(values_TF)

    def scores(self) -> Tensor:
        return self.mean() * self.per_neuron_F


def _strips(value_TX: Tensor) -> list[Tensor]:
    """So many tokens at a time that what is made of them stays in the processor's cache."""
    return [value_TX[start : start + _STRIP] for start in range(0, len(value_TX), _STRIP)]
