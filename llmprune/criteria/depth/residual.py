"""Divergence after a refit: the cost of a removal once the layer before it is refit to absorb it. Our own.

    score of layer l = mean over tokens of KL( dense model ‖ model without layer l, the layer before it refit )

A layer whose output the previous layer can predict is cheap to remove, however much it rotates the hidden states. With
``greedy``, refits of earlier rounds are kept. The refit is that of ``cross_validated_ridge`` at a fixed ridge, solved
on other windows than those that the divergence is measured on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from llmprune.common.errors import CalibrationError
from llmprune.common.linalg.kl_divergence import kl_divergence
from llmprune.criteria.ablation import AblationCriterion, AblationRefit, scaled
from llmprune.criteria.base import AblationCost, ScoringSize

if TYPE_CHECKING:
    from torch import Tensor


class Residual(AblationCriterion):
    """``depth: {remove: 6, criterion: {kind: residual, windows: 8, refit_windows: 16}}``."""

    kind: Literal["residual"] = "residual"
    refit_windows: int = Field(16, gt=0, description="Further calibration windows for the refit after each removal.")
    ridge: float = Field(0.5, gt=0, description="Ridge of that refit, in the units of refit.ridge.")

    @property
    def refit(self) -> AblationRefit:
        """Refit of the layer before each ablated layer."""
        return AblationRefit(self.refit_windows, self.ridge)

    def scaled(self, part: int, whole: int) -> Self:
        """Return the criterion with as large a share of ``part`` windows as it has of ``whole``, for both uses."""
        refit_windows = scaled(self.refit_windows, part, whole=whole)
        return super().scaled(part, whole).model_copy(update={"refit_windows": refit_windows})

    def require_samples(self, samples: int) -> None:
        """Raise CalibrationError where the divergence is measured on all samples, so that none is left to refit on."""
        if samples <= self.windows:
            raise CalibrationError(
                f"depth.criterion residual evaluates on {samples} of {samples} calibration samples, which leaves none "
                "to refit on; lower depth.criterion.windows or raise calibration.samples"
            )

    def hidden_state_bytes(self, size: ScoringSize) -> int:
        """Return the bytes of hidden states, with the refit's own windows and the inputs of two output projections."""
        judged, solved = self._windows_of_each(size.samples)
        values = 3 * solved * size.hidden + (judged + solved) * 2 * size.inputs
        return super().hidden_state_bytes(size) + values * size.length * size.itemsize

    def statistics_bytes(self, size: ScoringSize) -> int:
        """Return the bytes of one refit's sums and factor, and of the solutions that a round keeps for all layers."""
        return 4 * size.inputs * (2 * size.inputs + size.hidden * (size.layers + 2))

    def ablation_cost(self, layers: int, *, remove: int, windows: int, length: int) -> AblationCost:
        """Return the time that the rounds take, with a refit for every ablated layer in each."""
        cost = super().ablation_cost(layers, remove=remove, windows=windows, length=length)
        refits = (cost.models - cost.rounds) / layers
        _, solved = self._windows_of_each(windows)
        return replace(cost, forward_passes=cost.forward_passes + refits * solved / windows, refits=True)

    def _windows_of_each(self, samples: int) -> tuple[int, int]:
        """Return the number of windows that the divergence is measured on, and of those that refits are solved on."""
        judged = min(self.windows, samples)
        return judged, min(self.refit_windows, samples - judged)

    def token_costs(self, logits_BPV: Tensor, dense_BPV: Tensor, *, targets_BP: Tensor) -> Tensor:
        """Return the divergence of the distributions of each next token."""
        return kl_divergence(dense_BPV, logits_BPV)
