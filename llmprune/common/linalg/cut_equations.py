"""Normal equations of a projection that lost inputs which are known: what they contributed follows from their products.

    L = X_R W_Rᵀ + G        XᵀL = (XᵀX_R) W_Rᵀ + XᵀG        XᵀI = XᵀE − XᵀL        E = L + I

E: the whole error; G: the part of it that removed layers after this one cause. XᵀX_R is smaller than what a product
with all D outputs of each token would take, and E − L is not computed for each token.

Shapes: T tokens, D hidden size, S sketched outputs, K kept inputs, R removed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.common.linalg.cross_validated_ridge import NormalEquations, Repair
from llmprune.common.linalg.precision import exact_products


@dataclass(frozen=True)
class CutTokens:
    """Some tokens: kept and removed inputs of the projection, the whole error E, and G where layers are removed."""

    kept_TK: Tensor
    removed_TR: Tensor
    error_TD: Tensor
    gap_TD: Tensor | None


class CutEquations(NormalEquations):
    """Sums of E, from which those of both parts follow before the solution. ``removed_RD``: W_Rᵀ."""

    def __init__(self, ridge: float | None, folds: int, *, removed_RD: Tensor, one_source: bool = False) -> None:
        super().__init__(ridge, folds, one_source=one_source)
        self._removed_RD = removed_RD.float()
        self._gram_KR: Tensor | None = None

    @exact_products()
    def update_cut(self, tokens: CutTokens, *, fold: int) -> None:
        """Add tokens of one fold."""
        kept_TK, removed_TR, error_TD = tokens.kept_TK.float(), tokens.removed_TR.float(), tokens.error_TD.float()
        sums, fold = self._begin(kept_TK, error_TD, lost=True), fold % self.folds
        sums.add(kept_TK, None, inherited_TD=error_TD, fold=fold)
        lost_FD, lost_FS = _present(sums.lost_FD), _present(sums.folds[fold].lost_FS)
        if self._gram_KR is None:
            self._gram_KR = kept_TK.new_zeros(kept_TK.shape[1], removed_TR.shape[1])
        self._gram_KR.addmm_(kept_TK.T, removed_TR)
        lost_TS = removed_TR @ (self._removed_RD @ sums.sketch_DS)
        if tokens.gap_TD is not None:
            gap_TD = tokens.gap_TD.float()
            lost_FD.addmm_(kept_TK.T, gap_TD)
            lost_TS += gap_TD @ sums.sketch_DS
        lost_FS.addmm_(kept_TK.T, lost_TS)

    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves: adding to them in place adds to the equations."""
        return [*super().reducible_state(), _present(self._gram_KR)]

    @exact_products()
    def solve(self, where: str = "", *, setting: str = "refit.ridge") -> Repair:
        """Return the solution, as of the two parts of the error; overwrites the sums."""
        lost_FD = _present(self._sums.lost_FD)
        lost_FD.addmm_(_present(self._gram_KR), self._removed_RD)
        self._gram_KR = None
        self._sums.inherited_FD.sub_(lost_FD)
        for fold in self._sums.folds:
            fold.inherited_FS.sub_(_present(fold.lost_FS))
        return super().solve(where, setting=setting)


def _present(sums: Tensor | None) -> Tensor:
    assert sums is not None, "used after at least one batch"
    return sums
