"""Share of the projection's output, token by token: our own.

    score of neuron f = mean over tokens of ‖ x_f w_f ‖² / ‖ y ‖² · | cos(w_f, y) |        y = Σ over f of x_f w_f

where w_f is column f of the output projection. It differs from ``activation`` in two ways:

- Every token has the same weight. A few tokens hold most of the energy (the first of a window, delimiters), and each
  kind of text has high-energy tokens of its own; shares of each token's energy depend less on the calibration text.
- A neuron that writes along the token's output counts for more than one that others cancel. Losses along y add up
  with the number of removed neurons, losses across it with its square root.

It takes one additional product with each output projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.accumulators.mean_square import MeanSquare
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


_STRIP = 512  # tokens at a time: their intermediate values stay in the processor's cache


class Share(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: share}}``."""

    kind: Literal["share"] = "share"

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        return _Share(output_DF)

    def token_operations(self, width: int, hidden: int) -> float:
        """Return the operations of the product with the output projection."""
        return 2.0 * width * hidden


class _Share(MeanSquare):
    """Products are rounded as those of the layer itself; everything computed from them is float32."""

    def __init__(self, output_DF: Tensor) -> None:
        super().__init__(output_DF.float().norm(dim=0))
        self.output_DF = output_DF

    def update(self, values_BLF: Tensor) -> None:
        self.update_with(values_BLF, values_BLF @ self.output_DF.T)

    def update_with(self, values_BLF: Tensor, written_BLD: Tensor) -> None:
        values_TF, written_TD = values_BLF.flatten(0, -2), written_BLD.flatten(0, -2)
        for values_SF, written_SD in zip(_strips(values_TF), _strips(written_TD), strict=True):
            norm_S1 = written_SD.float().norm(dim=-1, keepdim=True)
            norm_S1 = norm_S1.where(norm_S1 > 0, math.inf)  # a zero output gives zero scores
            direction_SD = (written_SD.float() / norm_S1).to(values_SF.dtype)
            along_SF = (direction_SD @ self.output_DF).float().abs_()
            self.sum_F += along_SF.mul_((values_SF.float() / norm_S1).square_()).sum(0)
        self.tokens += len(values_TF)

    def scores(self) -> Tensor:
        return self.mean() * self.weight_factor_F


def _strips(value_TX: Tensor) -> list[Tensor]:
    """Return views of ``_STRIP`` tokens each; of the last tokens fewer."""
    return [value_TX[start : start + _STRIP] for start in range(0, len(value_TX), _STRIP)]
