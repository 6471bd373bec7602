"""Ridge-regression weight reconstruction; the ridge strength is chosen by cross-validation over calibration folds.

After a layer lost neurons, or the layers after it were removed, the weight W of an output projection is solved again so
that the pruned hidden states match the dense ones:

    minimise over Δ   ‖ X Δᵀ − E ‖² + λ · mean diag(XᵀX) · ‖ Δ ‖²        (XᵀX + μI) Δᵀ = XᵀE

X: inputs of the projection in the pruned model; E: error of the pruned layer's output with respect to the dense hidden
states; W₀ + Δ replaces the sliced weight W₀. This is ridge regression towards W₀, and its normal equations need two
sums over tokens.

E has two parts, E = L + α I. L is the error of this cut: the contributions of the removed neurons and layers. I is the
error inherited from earlier layers. X predicts L well and I badly, so I is mostly noise in the regression: only a
fraction α of it is added to the target. λ and α are both chosen by cross-validation over folds of the calibration
windows, which are its sources where there are several: Δ is solved without a fold and evaluated on it by

    ‖ X Δᵀ − (L + I) ‖² − ‖ L + I ‖² = tr(Δ G Δᵀ) − 2 tr(Δ M)        G = XᵀX, M = Xᵀ(L + I)

which needs only the sums of that fold and is quadratic in α. Of two folds only the second is held out: holding out the
first as well takes twice the time and hardly changes the choice. Where no λ makes the difference negative, the
projection keeps its sliced weights. A λ without a stable solution is skipped, and a stronger one is tried. Choosing two
numbers does not need all D outputs: S random combinations of them are used.

Both numbers were found with one of n folds left out. Over all folds the noise of the solution is (n − 1)/n as large,
so λ and the odds (1 − α)/α are scaled by that factor. Of folds of one source only the odds are: other text differs more
from that source than its parts differ from each other, and that does not change with the number of tokens. A λ given by
the user is the only one tried, and is not scaled.

Memory: one F × F matrix a fold and one more while solving.

Shapes: T tokens, D hidden size, S sketched outputs, F inputs of the projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.common.distributed import all_agree, broadcast_from_first
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.cholesky import factorize_in_place, mean_diagonal
from llmprune.common.linalg.fold_sums import Fold, FoldSums
from llmprune.common.linalg.gram import mirror
from llmprune.common.linalg.precision import exact_products, float64_sum, in_float64

_RIDGES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # from strong to weak
_MIN_RELATIVE_GAIN = 1e-3  # of the held-out squared error; less may be chance
_LEAST_INHERITED = 1e-9  # of the held-out squared error, what the solution for I predicts; less is rounding
_DEFAULT_RIDGE = 1.0  # where no fold can be held out; the value that most projections selected in our experiments


@dataclass(frozen=True)
class Repair:
    """Result of a refit.

    ``delta_DF``: Δ in float32, None where the sliced weights are better. ``ridge``: λ, None likewise. ``inherited``:
    the fraction α of the inherited error in the target. ``held_out``: relative change of the squared error on held-out
    folds, below 0 for an improvement; None where there are none.
    """

    delta_DF: Tensor | None
    ridge: float | None
    inherited: float
    held_out: float | None


class NormalEquations:
    """Sums over tokens of the regression: XᵀX [F, F] of each fold, XᵀL and XᵀI [F, D], and their sketches of each fold.

    All in float32. ``ridge``: λ, None to choose it by cross-validation over ``folds``. ``one_source``: the folds are
    parts of a single source of text.
    """

    def __init__(self, ridge: float | None, folds: int, *, one_source: bool = False) -> None:
        self.ridge, self.folds, self.one_source = ridge, folds, one_source
        self._begun: FoldSums | None = None  # sized by the first batch

    def update(self, input_TF: Tensor, lost_TD: Tensor | None, *, inherited_TD: Tensor, fold: int = 0) -> None:
        """Add inputs of the projection and both parts L and I of the error.

        ``lost_TD`` is None in all batches or in none. ``fold``: number of the fold, taken modulo the number of folds.
        """
        input_TF, inherited_TD = input_TF.float(), inherited_TD.float()
        sums = self._begin(input_TF, inherited_TD, lost=lost_TD is not None)
        sums.add(input_TF, lost_TD, inherited_TD=inherited_TD, fold=fold % self.folds)

    def _begin(self, input_TF: Tensor, error_TD: Tensor, *, lost: bool) -> FoldSums:
        """Return the sums, which the first batch allocates."""
        if self._begun is None:
            self._begun = FoldSums.zeros(input_TF, error_TD, folds=self.folds, lost=lost)
        return self._begun

    @property
    def _sums(self) -> FoldSums:
        assert self._begun is not None, "used after at least one batch"
        return self._begun

    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves: adding to them in place adds to the equations."""
        return self._sums.tensors()

    @exact_products()
    def subtract_current_output(self, weight_DF: Tensor) -> Tensor:
        """Turn the sums of Y, given to ``update`` as inherited error, into those of Y − X W₀ᵀ; return XᵀX [F, F].

        To be called once, before ``solve``. It costs one product of small matrices instead of one a token.
        """
        total_FF = torch.zeros_like(self._sums.folds[0].gram_FF)
        sketched_FS = weight_DF.T @ self._sums.sketch_DS
        for fold in self._sums.folds:
            mirror(fold.gram_FF)
            total_FF += fold.gram_FF
            written_FS = fold.gram_FF @ sketched_FS
            energy = (written_FS * sketched_FS).sum() - 2 * (sketched_FS * fold.inherited_FS).sum()
            fold.energy.add_(in_float64(energy)).clamp_(min=0)
            fold.inherited_FS.sub_(written_FS)
        self._sums.inherited_FD.addmm_(total_FF, weight_DF.T, alpha=-1)
        return total_FF

    @exact_products()
    def solve(self, where: str = "", *, setting: str = "refit.ridge") -> Repair:
        """Return the solution; overwrites the sums. Raises NumericalError where no ridge has a stable solution.

        ``where`` is the name of the projection and ``setting`` the place of the ridge in the recipe, for that error.
        """
        repair = broadcast_from_first(
            self._cross_validated()
        )  # rounding may make devices choose differently among equal ridges
        if repair is not None and repair.ridge is not None:
            scaled = for_all_folds(repair, len(self._sums.folds))
            repair = self._solved(replace(scaled, ridge=repair.ridge) if self.one_source else scaled)
        if repair is None:
            raise self._unstable(where, setting)
        return repair

    def _solved(self, found: Repair) -> Repair | None:
        """Solve over all folds at the ridge found, or at the first stronger one with a solution in every process.

        Return None where there is none.
        """
        moment_FD = self._sums.inherited_FD.mul_(found.inherited)
        if self._sums.lost_FD is not None:
            moment_FD += self._sums.lost_FD
        for ridge in self._strengths(found):
            solved_FD = _ridge(_total([fold.gram_FF for fold in self._sums.folds]), moment_FD, ridge=ridge)
            if all_agree(solved_FD is not None):
                assert solved_FD is not None, "all have a solution"
                return replace(found, ridge=ridge, delta_DF=solved_FD.T)
        return None

    def _strengths(self, found: Repair) -> list[float]:
        """Return the ridge to solve with and the stronger ones to try after it; only itself where the user gave it."""
        if self.ridge is not None:
            return [self.ridge]
        assert found.ridge is not None
        return [found.ridge, *(ridge for ridge in reversed(_RIDGES) if ridge > found.ridge)]

    def _unstable(self, where: str, setting: str) -> NumericalError:
        tried = f"ridge {self.ridge:g}" if self.ridge is not None else f"any ridge up to {_RIDGES[0]:g}"
        return NumericalError(
            f"the refit{f' of {where}' if where else ''} has no stable solution: {len(self._sums.inherited_FD)} "
            f"inputs and too few or too similar calibration tokens for {tried}, or sums that are not finite; "
            f"raise {setting} or calibration.samples"
        )

    def _cross_validated(self) -> Repair | None:
        """Return the ridge and the fraction of the inherited error that minimise the held-out error.

        No ridge where none reduces the error; None where none has a stable solution.
        """
        ridges, best = (_RIDGES, _RIDGES.index(_DEFAULT_RIDGE)) if self.ridge is None else ((self.ridge,), 0)
        energies = torch.stack([fold.energy for fold in self._sums.folds]).tolist()
        if len(energies) < 2 or not all(energies):
            return Repair(None, ridges[best], 1.0, None)  # a fold without tokens or error: nothing can be held out
        for fold in self._sums.folds:
            mirror(fold.gram_FF)
        tried: dict[int, tuple[float, float]] = {}

        def change(index: int) -> float:
            if index not in tried:
                tried[index] = self._held_out(ridges[index])
            return tried[index][1]

        while math.isinf(change(best)):  # not positive definite: a stronger ridge may be
            if best == 0:
                return None
            best -= 1
        for direction in (1, -1):  # weaker, then stronger, while the error falls: it has one minimum
            while 0 <= best + direction < len(ridges) and change(best + direction) < change(best):
                best += direction
        if change(best) >= -_MIN_RELATIVE_GAIN:
            return Repair(None, None, 0.0, 0.0)
        return Repair(None, ridges[best], *tried[best])

    def _held_out(self, ridge: float) -> tuple[float, float]:
        """Return the best fraction of the inherited error in [0, 1], and the relative change of the held-out error.

        The change is infinity where the equations have no stable solution.
        """
        held_out = self._sums.folds if len(self._sums.folds) > 2 else self._sums.folds[1:]
        products = held_out[0].energy.new_zeros(5)
        for held in held_out:
            products += self._products_on(held, ridge=ridge) / held.energy.clamp_min(1e-30) / len(held_out)
        found = products.tolist()  # the only wait for the device at this ridge
        if not all(map(math.isfinite, found)):
            return 0.0, math.inf
        lost_lost, lost_inherited, inherited_inherited, lost_wanted, inherited_wanted = found
        share = 0.0
        if inherited_inherited > _LEAST_INHERITED:
            share = min(max((inherited_wanted - lost_inherited) / inherited_inherited, 0.0), 1.0)
        change = lost_lost + 2 * share * lost_inherited + share**2 * inherited_inherited
        change -= 2 * (lost_wanted + share * inherited_wanted)
        return share, change if math.isfinite(change) else math.inf

    def _products_on(self, held: Fold, *, ridge: float) -> Tensor:
        """Solve for L and for I without one fold; return the five coefficients of its error as a polynomial in α.

        float64 [5]: the products of the outputs for L and for I with each other and with the target. Not finite where
        the equations have no stable solution.
        """
        others = [fold for fold in self._sums.folds if fold is not held]
        gram_FF = _total([fold.gram_FF for fold in others])
        inherited_FS, wanted_FS = _sum([fold.inherited_FS for fold in others]), held.inherited_FS
        lost_FS = inherited_FS[:, :0]
        if held.lost_FS is not None:
            lost_FS = _sum([fold.lost_FS for fold in others if fold.lost_FS is not None])
            wanted_FS = held.lost_FS + held.inherited_FS
        widths = [lost_FS.shape[1], inherited_FS.shape[1]]
        solved_FS = _ridge_or_nan(gram_FF, torch.cat([lost_FS, inherited_FS], dim=1), ridge=ridge)
        by_lost_FS, by_inherited_FS = torch.split(solved_FS, widths, dim=1)
        output_lost_FS, output_inherited_FS = torch.split(held.gram_FF @ solved_FS, widths, dim=1)
        pairs = [
            (by_lost_FS, output_lost_FS),
            (by_lost_FS, output_inherited_FS),
            (by_inherited_FS, output_inherited_FS),
            (by_lost_FS, wanted_FS),
            (by_inherited_FS, wanted_FS),
        ]
        return torch.stack([float64_sum(a * b[:, : a.shape[1]]) for a, b in pairs])


def for_all_folds(repair: Repair, folds: int) -> Repair:
    """Return the ridge and the fraction found with one fold left out, scaled to the sums over all folds."""
    if folds < 2 or repair.ridge is None:
        return repair
    noise = (folds - 1) / folds
    alpha = repair.inherited
    return replace(repair, ridge=repair.ridge * noise, inherited=alpha / (alpha + (1 - alpha) * noise))


def _sum(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(parts).sum(0)


def _total(grams: Sequence[Tensor]) -> Tensor:
    """Return the sum of Gram matrices as a new matrix, without a copy of each."""
    total_FF = grams[0].clone()
    for gram_FF in grams[1:]:
        total_FF += gram_FF
    return total_FF


def _ridge(gram_FF: Tensor, moment_FD: Tensor, *, ridge: float) -> Tensor | None:
    """Return (XᵀX + μI)⁻¹ moment, or None where the matrix is not positive definite or the solution not finite."""
    solved_FD = _ridge_or_nan(gram_FF, moment_FD, ridge=ridge)
    return solved_FD if torch.isfinite(solved_FD).all() else None


def _ridge_or_nan(gram_FF: Tensor, moment_FD: Tensor, *, ridge: float) -> Tensor:
    """Return (XᵀX + μI)⁻¹ moment, NaN where the matrix is not positive definite; nothing waits for the device.

    Only the upper triangle of the Gram matrix is read; its factor overwrites it.
    """
    gram_FF.diagonal().add_(mean_diagonal(gram_FF, ridge))
    factor_FF, failed = factorize_in_place(gram_FF, upper=True)
    return torch.cholesky_solve(moment_FD, factor_FF, upper=True).masked_fill_(failed != 0, torch.nan)
