"""The up projection of a gated MLP solved again, so that the neurons that stay write more of what is missing.

A gated MLP writes ((X Uᵀ + b) ∘ S) Dᵀ, with gates S that do not depend on the up projection U. So with gate and down
projection D as they are, what it writes is linear in U, and its change P is a least-squares problem as well:

    minimise over P   ‖ ((X Pᵀ) ∘ S) Dᵀ − R ‖² + ‖ P ‖²_H        R: the dense hidden states less the cut layer's

Its Gram matrix has (F I)² entries and is never formed: conjugate gradients need products with X, S and D alone. H
is what that matrix would be if neurons did not overlap and gates did not hang on the input, evened out a little; it is
the preconditioner, and the pull towards the old weights:

    ‖ P ‖²_H = Σ_f  (h_f + ε · mean h) · p_fᵀ (XᵀX + μI) p_f        h_f = mean(s_f²) ‖ d_f ‖²

Every token says the same: its row of S and of R is over the root mean square of what it should get. Few tokens (the
first of a window, delimiters) have hidden states far longer than the others', and errors as long; a norm comes after.

The first steps fit what most tokens share, so that their number decides how closely the text is fit: none is taken
that makes every eighth window, which the solve does not see, no better. Most layers of SmolLM2 stop after six to eight,
the first three after ten to sixteen. (With these constants calibration windows that no solve saw came out best, in the
layers of SmolLM2 that we looked at.)

The down projection is solved after it. That solve changes where a neuron writes, this one how much it does for which
input.

Shapes: B batch, L sequence length, T tokens, I inputs of the up projection, F neurons, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.common.distributed import broadcast_from_first, sum_over_processes
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.gram import add_gram, mirror
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.prune.repair.folds import Folds

_STEPS = 16
_RIDGE = 0.1  # μ, in units of the mean of diag(XᵀX)
_EVEN = 0.3  # ε
_WORTH = 1e-3  # least relative change of the held-out squared error by a step; less may be chance


@dataclass(frozen=True)
class UpRepair:
    """Δ [F, I] in float32, None where no step helped; and the relative change of the squared error on windows held
    out, every token alike; None where there are none.
    """

    delta_FI: Tensor | None
    held_out: float | None


class UpEquations:
    """What a gated MLP gets, lets through and misses, kept of all windows in ``room``; ``down_DF`` is left as it is."""

    def __init__(self, down_DF: Tensor, held_out: Folds, *, room: Callable[[Tensor], HiddenStates]) -> None:
        self.down_DF, self.held_out, self.room = down_DF.float(), held_out, room
        self._kept: list[HiddenStates] = []  # X, S, R, and what the last step's direction writes
        self._energy = torch.zeros(2, dtype=torch.float64)  # ‖R‖² of the tokens that are solved on and held out

    def update(self, input_BLI: Tensor, gates_BLF: Tensor, *, missing_BLD: Tensor, wanted_BLD: Tensor) -> None:
        """Take in the next batch. ``wanted_BLD``: what a token should get, whose size errors are relative to."""
        size_BL1 = wanted_BLD.float().square().mean(-1, keepdim=True).sqrt()
        size_BL1 = size_BL1.where(size_BL1 > 0, 1.0)
        missing_BLD = missing_BLD.float() / size_BL1
        gates_BLF = (gates_BLF / size_BL1).to(gates_BLF.dtype)
        for place, value in enumerate((input_BLI, gates_BLF, missing_BLD, torch.zeros_like(missing_BLD))):
            if len(self._kept) <= place:
                self._kept.append(self.room(value))
            self._kept[place].append(value)
        for fold, (missing_TD,) in self.held_out.parts(len(self._kept[0]) - 1, missing_BLD):
            self._energy[fold] += float(missing_TD.square().sum(dtype=torch.float64))

    @torch.no_grad()
    def solve(self) -> UpRepair:
        """The repair; what was kept is used up. Raises NumericalError where XᵀX has no inverse."""
        sum_over_processes([self._energy])
        if self.held_out.count < 2 or not float(self._energy.min()):
            return UpRepair(None, None)
        metric = self._metric()
        delta_FI = direction_FI = self.down_DF.new_zeros(metric.shape)
        steepness, change, length = 0.0, 0.0, 0.0
        for _ in range(_STEPS):
            gradient_FI = self._gradient(length) - metric.times(delta_FI)
            scaled_FI = metric.solve(gradient_FI)
            before, steepness = steepness, float((gradient_FI * scaled_FI).sum())
            direction_FI = scaled_FI + direction_FI * (steepness / before if before else 0.0)
            solved, judged_missing, judged = self._move(direction_FI)
            length = steepness / max(solved + float((direction_FI * metric.times(direction_FI)).sum()), 1e-30)
            gain = (length**2 * judged - 2 * length * judged_missing) / float(self._energy[1])
            if not broadcast_from_first(gain <= -_WORTH * (1 + change)):
                break
            change += gain
            delta_FI = delta_FI + direction_FI * length
        return UpRepair(delta_FI if change else None, change)

    def _metric(self) -> _Metric:
        """H, of the tokens that are solved on."""
        inputs, gates, *_ = self._kept
        width, neurons = inputs[0].shape[-1], gates[0].shape[-1]
        gram_II, squares_F = self.down_DF.new_zeros(width, width), self.down_DF.new_zeros(neurons)
        tokens = self.down_DF.new_zeros(1)
        for batch in range(len(inputs)):
            for fold, (input_TI, gates_TF) in self._parts(batch, inputs, gates):
                if fold == 0:
                    add_gram(gram_II, input_TI)
                    squares_F += gates_TF.square().sum(0)
                    tokens += len(input_TI)
        sum_over_processes([gram_II, squares_F, tokens])
        mirror(gram_II)
        gram_II.diagonal().add_(_RIDGE * gram_II.diagonal().mean())
        scale_F = squares_F / tokens * self.down_DF.square().sum(0)
        return _Metric(scale_F + (_EVEN * scale_F.mean()).clamp_min(1e-30), gram_II)

    def _gradient(self, length: float) -> Tensor:
        """Bring R up to date with the last step, and sum (R D ∘ S)ᵀ X over the tokens that are solved on."""
        inputs, gates, missing, moved = self._kept
        gradient_FI = self.down_DF.new_zeros(gates[0].shape[-1], inputs[0].shape[-1])
        for batch in range(len(inputs)):
            behind_BLD, moved_BLD = (kept[batch].to(self.down_DF.device) for kept in (missing, moved))
            missing[batch] = behind_BLD - length * moved_BLD
            for fold, (input_TI, gates_TF, missing_TD) in self._parts(batch, inputs, gates, missing):
                if fold == 0:
                    gradient_FI.addmm_((missing_TD @ self.down_DF).mul_(gates_TF).T, input_TI)
        sum_over_processes([gradient_FI])
        return gradient_FI

    def _move(self, direction_FI: Tensor) -> list[float]:
        """M = ((X Qᵀ) ∘ S) Dᵀ for a direction Q, kept; ‖M‖² of the tokens solved on, and R·M and ‖M‖² of the others."""
        inputs, gates, missing, moved = self._kept
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in range(len(inputs)):
            input_BLI, gates_BLF = (kept[batch].to(self.down_DF.device).float() for kept in (inputs, gates))
            moved_BLD = (input_BLI @ direction_FI.T).mul_(gates_BLF) @ self.down_DF.T
            for fold, (moved_TD, missing_TD) in self.held_out.parts(batch, moved_BLD, missing[batch].to(moved_BLD)):
                square = float(moved_TD.square().sum(dtype=torch.float64))
                if fold == 0:
                    sums[0] += square
                else:
                    sums[1] += float((moved_TD * missing_TD).sum(dtype=torch.float64))
                    sums[2] += square
            moved[batch] = moved_BLD
        sum_over_processes([sums])
        found: list[float] = sums.tolist()
        return found

    def _parts(self, batch: int, *kept: HiddenStates) -> Iterator[tuple[int, list[Tensor]]]:
        values = [one[batch].to(self.down_DF.device).float() for one in kept]
        return self.held_out.parts(batch, *values)


class _Metric:
    """H: for each neuron the damped XᵀX, times what the neuron's gate and down projection make of it."""

    def __init__(self, scale_F: Tensor, gram_II: Tensor) -> None:
        self.scale_F1, self.gram_II = scale_F[:, None], gram_II
        self.shape = len(scale_F), len(gram_II)
        self._factor_II, failed = torch.linalg.cholesky_ex(gram_II)
        if int(failed) or not torch.isfinite(scale_F).all():
            raise NumericalError(
                f"the up projection cannot be solved again: XᵀX of its {len(gram_II)} inputs is not finite or has no "
                "inverse; raise calibration.samples or set refit.up to false"
            )

    def times(self, value_FI: Tensor) -> Tensor:
        """H P."""
        return (value_FI @ self.gram_II).mul_(self.scale_F1)

    def solve(self, value_FI: Tensor) -> Tensor:
        """H⁻¹ P."""
        return torch.cholesky_solve((value_FI / self.scale_F1).T, self._factor_II).T
