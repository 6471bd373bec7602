"""The closed-form repair of what a cut breaks, as strong as text that the solve did not see bears out.

After a layer lost neurons, or its successors went, the weight W of an output
projection is solved again so that the pruned hidden states match the dense ones:

    minimise over Δ   ‖ X Δᵀ − E ‖² + λ · mean diag(XᵀX) · ‖ Δ ‖²        (XᵀX + μI) Δᵀ = XᵀE

X: the projection's inputs on the pruned stream; E: how far the pruned layer's output
is from the dense hidden states to reach; W₀ + Δ replaces the sliced weight W₀. This is
ridge regression towards W₀, and its normal equations need two sums over tokens.

E has two parts, E = L + α I. L is what this cut lost: the removed neurons' own
contributions, and those of the removed layers. I is what earlier layers' errors left
behind. X explains L well and I badly, so that I is mostly noise to the solve: it is
let in only as far as it helps. Both λ and α are chosen by cross-validation over
folds of the calibration windows, which are its sources where there are several:
Δ is solved without a fold and judged on it by

    ‖ X Δᵀ − (L + I) ‖² − ‖ L + I ‖² = tr(Δ G Δᵀ) − 2 tr(Δ M)        G = XᵀX, M = Xᵀ(L + I)

which needs that fold's sums alone and is quadratic in α. Of two folds only the
second is a judge: to ask the first as well takes twice the time and chooses nearly alike.
Where no λ makes it negative, the projection is left as it was sliced. A λ without a
stable solution has failed, and a stronger one is tried. The choice of two numbers
does not need all D outputs: it is made on S random combinations of them.
Both were found with one of n folds left out; over all of them the solve's own noise
is (n − 1)/n as large, and so are λ and the odds (1 − α)/α against the inherited error.
A λ that is given is the only one that is tried, and stays as it is.

Memory: one F × F matrix a fold and one more while solving.

Shapes: T tokens, D hidden size, S sketched outputs, F inputs of the projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.common.distributed import all_agree, broadcast_from_first
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.gram import add_gram, mirror

_RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # from strong to weak
_WORTH = 1e-3  # least relative change of the held-out squared error; less may be chance
_UNTRIED = 1.0  # what most projections of the models that we tried end with
_SKETCHED = 64


@dataclass(frozen=True)
class Repair:
    """What was solved: Δ [D, F] in float32, None where the sliced weights are better; how strong, and its worth.

    ``held_out``: relative change of the squared error on folds that the solve did not see; None where there are none.
    """

    delta_DF: Tensor | None
    ridge: float | None
    inherited: float
    held_out: float | None


class NormalEquations:
    """XᵀX [F, F] by fold, XᵀL and XᵀI [F, D], and by fold sketches of those, summed over tokens in float32."""

    def __init__(self, ridge: float | None, folds: int) -> None:
        self.ridge, self.folds = ridge, folds
        self._folds: list[_Fold] = []

    def update(self, input_TF: Tensor, lost_TD: Tensor | None, *, inherited_TD: Tensor, fold: int = 0) -> None:
        """Take in inputs of the projection and both parts of the error; ``lost_TD`` None in all batches or in none."""
        input_TF, inherited_TD = input_TF.float(), inherited_TD.float()
        if not self._folds:
            self._start(input_TF, inherited_TD, lost=lost_TD is not None)
        into = self._folds[fold % self.folds]
        add_gram(into.gram_FF, input_TF)
        self._inherited_FD.addmm_(input_TF.T, inherited_TD)
        wanted_TS = inherited_TS = inherited_TD @ self._sketch_DS
        into.inherited_FS.addmm_(input_TF.T, inherited_TS)
        if lost_TD is not None:
            assert self._lost_FD is not None, "given in the first batch too"
            assert into.lost_FS is not None
            lost_TD = lost_TD.float()
            self._lost_FD.addmm_(input_TF.T, lost_TD)
            lost_TS = lost_TD @ self._sketch_DS
            into.lost_FS.addmm_(input_TF.T, lost_TS)
            wanted_TS = inherited_TS + lost_TS
        into.energy.add_(wanted_TS.square().sum(dtype=torch.float64))

    def _start(self, input_TF: Tensor, error_TD: Tensor, *, lost: bool) -> None:
        width, hidden = input_TF.shape[1], error_TD.shape[1]
        sketched = min(hidden, _SKETCHED)
        sketch_DS = torch.randn(hidden, sketched, generator=torch.Generator().manual_seed(0)) / sketched**0.5
        self._sketch_DS = sketch_DS.to(input_TF.device)
        self._inherited_FD = input_TF.new_zeros(width, hidden)
        self._lost_FD = input_TF.new_zeros(width, hidden) if lost else None
        for _ in range(self.folds):
            gram_FF, inherited_FS = input_TF.new_zeros(width, width), input_TF.new_zeros(width, sketched)
            lost_FS = input_TF.new_zeros(width, sketched) if lost else None
            self._folds.append(_Fold(gram_FF, inherited_FS, input_TF.new_zeros((), dtype=torch.float64), lost_FS))

    def sums(self) -> list[Tensor]:
        """All sums themselves, for several processes to add up."""
        assert self._folds, "summed after at least one batch"
        by_fold = [tensor for fold in self._folds for tensor in fold]
        return [tensor for tensor in (self._lost_FD, self._inherited_FD, *by_fold) if tensor is not None]

    def take_off(self, weight_DF: Tensor) -> Tensor:
        """Make the sums those of Y − X W₀ᵀ where ``update`` was given Y as inherited; returns XᵀX [F, F].

        To be called once, before ``solve``: it is one product of small matrices in place of one for each token.
        """
        total_FF = torch.zeros_like(self._folds[0].gram_FF)
        sketched_FS = weight_DF.T @ self._sketch_DS
        for fold in self._folds:
            mirror(fold.gram_FF)
            total_FF += fold.gram_FF
            written_FS = fold.gram_FF @ sketched_FS
            energy = (written_FS * sketched_FS).sum() - 2 * (sketched_FS * fold.inherited_FS).sum()
            fold.energy.add_(energy).clamp_(min=0)
            fold.inherited_FS.sub_(written_FS)
        self._inherited_FD.addmm_(total_FF, weight_DF.T, alpha=-1)
        return total_FF

    def solve(self, where: str = "", *, setting: str = "refit.ridge") -> Repair:
        """The repair; the sums are used up. Raises NumericalError where no ridge that is tried has a stable solution.

        ``where`` names the projection and ``setting`` the ridge's place in the recipe, both for that error.
        """
        assert self._folds, "solved after at least one batch"
        repair = broadcast_from_first(self._cross_validated())  # of nearly equal ridges devices may choose others
        if repair is not None and repair.ridge is not None:
            repair = self._solved(for_all_folds(repair, len(self._folds)))
        if repair is None:
            raise self._unstable(where, setting)
        return repair

    def _solved(self, found: Repair) -> Repair | None:
        """Solve over all folds at the ridge that was found, else at the first stronger one that every process can solve
        with; None where there is none.
        """
        moment_FD = self._inherited_FD.mul_(found.inherited)
        if self._lost_FD is not None:
            moment_FD += self._lost_FD
        for ridge in self._strengths(found):
            solved_FD = _ridge(_total([fold.gram_FF for fold in self._folds]), moment_FD, ridge=ridge)
            if all_agree(solved_FD is not None):
                assert solved_FD is not None, "all have a solution"
                return replace(found, ridge=ridge, delta_DF=solved_FD.T)
        return None

    def _strengths(self, found: Repair) -> list[float]:
        """The ridge to solve with, and the stronger ones to try after it; of a given ridge there are none."""
        if self.ridge is not None:
            return [self.ridge]
        assert found.ridge is not None
        return [found.ridge, *(ridge for ridge in reversed(_RIDGES) if ridge > found.ridge)]

    def _unstable(self, where: str, setting: str) -> NumericalError:
        tried = f"ridge {self.ridge:g}" if self.ridge is not None else f"any ridge up to {_RIDGES[0]:g}"
        return NumericalError(
            f"the refit{f' of {where}' if where else ''} has no stable solution: {self._folds[0].gram_FF.shape[0]} "
            f"inputs and too few or too similar calibration tokens for {tried}, or sums that are not finite; "
            f"raise {setting} or calibration.samples"
        )

    def _cross_validated(self) -> Repair | None:
        """Ridge and share of the inherited error by the held-out error; no ridge where none makes it less.

        None where no ridge has a stable solution.
        """
        ridges, best = (_RIDGES, _RIDGES.index(_UNTRIED)) if self.ridge is None else ((self.ridge,), 0)
        if len(self._folds) < 2 or any(not float(fold.energy) for fold in self._folds):
            return Repair(None, ridges[best], 1.0, None)  # a single window: nothing can be held out
        for fold in self._folds:
            mirror(fold.gram_FF)
        tried: dict[int, tuple[float, float]] = {}

        def change(place: int) -> float:
            if place not in tried:
                tried[place] = self._held_out(ridges[place])
            return tried[place][1]

        while math.isinf(change(best)):  # not positive definite: a stronger ridge may be
            if best == 0:
                return None
            best -= 1
        for direction in (1, -1):  # first weaker, else stronger, as long as it gets better: the error has one valley
            while 0 <= best + direction < len(ridges) and change(best + direction) < change(best):
                best += direction
        if change(best) >= -_WORTH:
            return Repair(None, None, 0.0, 0.0)
        return Repair(None, ridges[best], *tried[best])

    def _held_out(self, ridge: float) -> tuple[float, float]:
        """The best share of the inherited error in [0, 1], and the relative change of the held-out error with it:
        infinity where the equations have no stable solution.
        """
        products = torch.zeros(5, dtype=torch.float64)
        judges = self._folds if len(self._folds) > 2 else self._folds[1:]
        for held in judges:
            others = [fold for fold in self._folds if fold is not held]
            gram_FF = _total([fold.gram_FF for fold in others])
            inherited_FS, wanted_FS = _sum([fold.inherited_FS for fold in others]), held.inherited_FS
            lost_FS = inherited_FS[:, :0]
            if held.lost_FS is not None:
                lost_FS = _sum([fold.lost_FS for fold in others if fold.lost_FS is not None])
                wanted_FS = held.lost_FS + held.inherited_FS
            widths = [lost_FS.shape[1], inherited_FS.shape[1]]
            solved_FS = _ridge(gram_FF, torch.cat([lost_FS, inherited_FS], dim=1), ridge=ridge)
            if solved_FS is None:
                return 0.0, math.inf
            by_lost_FS, by_inherited_FS = torch.split(solved_FS, widths, dim=1)
            seen_lost_FS, seen_inherited_FS = torch.split(held.gram_FF @ solved_FS, widths, dim=1)
            del gram_FF
            pairs = [
                (by_lost_FS, seen_lost_FS),
                (by_lost_FS, seen_inherited_FS),
                (by_inherited_FS, seen_inherited_FS),
                (by_lost_FS, wanted_FS),
                (by_inherited_FS, wanted_FS),
            ]
            found = torch.stack([(a * b[:, : a.shape[1]]).sum(dtype=torch.float64) for a, b in pairs])
            products += (found / held.energy.clamp_min(1e-30) / len(judges)).cpu()
        lost_lost, lost_inherited, inherited_inherited, lost_wanted, inherited_wanted = products.tolist()
        share = 0.0
        if inherited_inherited > 0:
            share = min(max((inherited_wanted - lost_inherited) / inherited_inherited, 0.0), 1.0)
        change = lost_lost + 2 * share * lost_inherited + share**2 * inherited_inherited
        change -= 2 * (lost_wanted + share * inherited_wanted)
        return share, change if math.isfinite(change) else math.inf


def for_all_folds(repair: Repair, folds: int) -> Repair:
    """What was found with one fold left out, for the sums over all of them."""
    if folds < 2 or repair.ridge is None:
        return repair
    noise = (folds - 1) / folds
    share = repair.inherited
    return replace(repair, ridge=repair.ridge * noise, inherited=share / (share + (1 - share) * noise))


class _Fold(NamedTuple):
    gram_FF: Tensor  # its upper triangle
    inherited_FS: Tensor
    energy: Tensor
    lost_FS: Tensor | None  # None where all is inherited


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of equal-shaped tensors."""
    return torch.stack(parts).sum(0)


def _total(grams: Sequence[Tensor]) -> Tensor:
    """The sum of some folds' Gram matrices, in one new matrix."""
    total_FF = grams[0].clone()
    for gram_FF in grams[1:]:
        total_FF += gram_FF
    return total_FF


def _ridge(gram_FF: Tensor, moment_FD: Tensor, *, ridge: float) -> Tensor | None:
    """(XᵀX + μI)⁻¹ moment; None where the matrix is not positive definite or the solution is not finite.

    The Gram matrix, of which the upper triangle counts, is overwritten by its factor.
    """
    strength = (ridge * gram_FF.diagonal().mean()).clamp_min(1e-30)  # where nothing fires, the mean is 0
    gram_FF.diagonal().add_(strength)
    failed = torch.zeros((), dtype=torch.int32, device=gram_FF.device)
    torch.linalg.cholesky_ex(gram_FF, upper=True, out=(gram_FF, failed))
    solved_FD = torch.cholesky_solve(moment_FD, gram_FF, upper=True)
    return None if int(failed) or not torch.isfinite(solved_FD).all() else solved_FD
