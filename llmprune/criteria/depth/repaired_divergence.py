"""Residual after refit: what a removal still costs once the layer before it is refit. Our own.

    score of layer l = mean over tokens of KL( dense model ‖ model without layer l, the layer before it refit )

A layer that the one before it can stand in for goes cheaply, however much it turns the hidden states. Chosen
greedily: the repairs for the layers that are gone already stay. The refit is that of ``normal_equations`` at a fixed
ridge, solved on windows that the divergence is not judged on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.base import TrialCriterion, scaled

if TYPE_CHECKING:
    from torch import Tensor


class Residual(TrialCriterion):
    """``depth: {remove: 6, criterion: {kind: residual, windows: 8, refit_windows: 16}}``."""

    kind: Literal["residual"] = "residual"
    refit_windows: int = Field(16, gt=0, description="Further calibration windows that the trials' refit is solved on.")
    ridge: float = Field(0.5, gt=0, description="Ridge of the trials' refit, in the units of refit.ridge.")

    def scaled(self, part: int, whole: int) -> Self:
        """The same for so many windows where it is meant for a whole calibration."""
        refit_windows = scaled(self.refit_windows, part, whole=whole)
        return super().scaled(part, whole).model_copy(update={"refit_windows": refit_windows})

    def shares(self, samples: int) -> tuple[int, int]:
        """How many of so many windows are judged on, and how many others are solved on."""
        judged = min(self.windows, samples)
        return judged, min(self.refit_windows, samples - judged)

    def cost(self, logits_BLV: Tensor, dense_BLV: Tensor, *, ids_BL: Tensor) -> Tensor:
        """Divergence at each token but the last."""
        return kl_divergence(dense_BLV[:, :-1], logits_BLV[:, :-1])
