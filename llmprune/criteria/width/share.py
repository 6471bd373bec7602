"""Share of the projection's output, token by token: our own.

    score of neuron f = mean over tokens of ‖ x_f w_f ‖² / ‖ y ‖² · | cos(w_f, y) |        y = Σ over f of x_f w_f

where w_f is column f of the output projection. It differs from ``activation`` in two ways:

- Every token has the same weight. A few tokens hold most of the energy (the first of a window, delimiters), and each
  kind of text has high-energy tokens of its own; shares of each token's energy depend less on the calibration text.
- A neuron that writes along the token's output counts for more than one that others cancel. Losses along y add up
  with the number of removed neurons, losses across it with its square root.

The angles take one additional product with each output projection. Of many tokens every n-th is enough for them: with
e the first factor and c the angle, the mean of e · c over all tokens is estimated by

    mean(e) over all tokens · sum(e · c) / sum(e) over every n-th token

which has about a third of the error of the mean over every n-th token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import PrivateAttr

from llmprune.criteria.accumulators.base import UnitAccumulator
from llmprune.criteria.accumulators.mean_square import MeanSquare
from llmprune.criteria.base import WidthCriterion

if TYPE_CHECKING:
    from torch import Tensor


_STRIP = 512  # tokens at a time: their intermediate values stay in the processor's cache
_ANGLES = 2048  # tokens whose angles are enough: the chosen neurons then vary less than with the calibration windows
_LEAST_SEEN = 1e-9  # of the sum of the first factor over all tokens: less is no basis for an angle


class Share(WidthCriterion):
    """``width: {mlp: 0.75, criterion: {kind: share}}``."""

    kind: Literal["share"] = "share"
    _every: int = PrivateAttr(1)

    def for_tokens(self, tokens: int) -> Self:
        """Return the criterion that computes the angles of every n-th token, n being a power of two."""
        criterion = self.model_copy()
        criterion._every = 1 << max((tokens // _ANGLES).bit_length() - 1, 0)
        return criterion

    def make_accumulator(self, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        """Return the empty accumulator of one unit with this output projection."""
        return _Share(output_DF, self._every)

    def token_operations(self, width: int, hidden: int) -> float:
        """Return the operations of the product with the output projection, on average over the tokens."""
        return 2.0 * width * hidden / self._every


class _Share(MeanSquare):
    """Products are rounded as those of the layer itself; everything computed from them is float32.

    ``every``: the angles of every n-th token in the order of ``update_with`` are computed; of ``update`` those of all.
    """

    def __init__(self, output_DF: Tensor, every: int) -> None:
        super().__init__(output_DF.float().norm(dim=0))
        self.output_DF, self.every = output_DF, every
        self.seen = 0
        self.compared_F, self.along_F = self.sum_F.new_zeros(self.sum_F.shape), self.sum_F.new_zeros(self.sum_F.shape)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the first factor, over all tokens and over every n-th, and of the product with angles."""
        return [*super().reducible_state(), self.compared_F, self.along_F]

    def update(self, values_BLF: Tensor) -> None:
        self._add(values_BLF.flatten(0, -2), (values_BLF @ self.output_DF.T).flatten(0, -2), every=1)

    def update_with(self, values_BLF: Tensor, written_BLD: Tensor) -> None:
        self._add(values_BLF.flatten(0, -2), written_BLD.flatten(0, -2), every=self.every)

    def _add(self, values_TF: Tensor, written_TD: Tensor, *, every: int) -> None:
        for values_SF, written_SD in zip(_strips(values_TF), _strips(written_TD), strict=True):
            norm_S1 = written_SD.float().norm(dim=-1, keepdim=True)
            norm_S1 = norm_S1.where(norm_S1 > 0, math.inf)  # a zero output gives zero scores
            energy_SF = (values_SF.float() / norm_S1).square_()
            self.sum_F += energy_SF.sum(0)
            some = slice(-self.seen % every, None, every)
            self.seen += len(values_SF)
            direction_SD = (written_SD[some].float() / norm_S1[some]).to(values_SF.dtype)
            along_SF = (direction_SD @ self.output_DF).float().abs_()
            self.compared_F += energy_SF[some].sum(0)
            self.along_F += along_SF.mul_(energy_SF[some]).sum(0)
        self.tokens += len(values_TF)

    def scores(self) -> Tensor:
        share_F = self.along_F * (self.sum_F / self.compared_F) / self.tokens.clamp_min(1)
        mean_angle = self.along_F.sum() / self.compared_F.sum().clamp_min(1e-30)
        is_seen_F = self.compared_F > _LEAST_SEEN * self.sum_F  # active where angles are computed
        share_F = share_F.where(is_seen_F, self.mean() * mean_angle)
        return share_F * self.weight_factor_F


def _strips(value_TX: Tensor) -> list[Tensor]:
    """Return views of ``_STRIP`` tokens each; of the last tokens fewer."""
    return [value_TX[start : start + _STRIP] for start in range(0, len(value_TX), _STRIP)]
