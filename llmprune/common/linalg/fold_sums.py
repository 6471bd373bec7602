"""Sums over tokens that the cross-validated ridge regression needs, of all calibration folds together and of each.

Shapes: T tokens, D hidden size, S sketched outputs, F inputs of the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.common.linalg.gram import add_gram
from llmprune.common.linalg.precision import exact_products, float64_device, float64_sum

SKETCHED = 64  # outputs of the sketch


class Fold(NamedTuple):
    """Sums of one fold: XᵀX, of which only the upper triangle is computed, and sketches of XᵀI and XᵀL.

    ``energy``: squares of the sketched error, float64. ``lost_FS``: None where the whole error is inherited.
    """

    gram_FF: Tensor
    inherited_FS: Tensor
    energy: Tensor
    lost_FS: Tensor | None


class FoldSums(NamedTuple):
    """XᵀI and XᵀL of all folds together, the sketch, and the sums of each fold.

    ``lost_FD``: None where the whole error is inherited.
    """

    sketch_DS: Tensor
    inherited_FD: Tensor
    lost_FD: Tensor | None
    folds: tuple[Fold, ...]

    @classmethod
    def zeros(cls, input_TF: Tensor, error_TD: Tensor, *, folds: int, lost: bool) -> FoldSums:
        """Return empty sums for inputs and errors of this size, on their device."""
        width, hidden = input_TF.shape[1], error_TD.shape[1]
        size, new = min(hidden, SKETCHED), input_TF.new_zeros
        sketch_DS = torch.randn(hidden, size, generator=torch.Generator().manual_seed(0)) / size**0.5
        energies = torch.zeros(folds, dtype=torch.float64, device=float64_device(input_TF.device))
        parts = tuple(
            Fold(new(width, width), new(width, size), energy, new(width, size) if lost else None) for energy in energies
        )
        return cls(sketch_DS.to(input_TF.device), new(width, hidden), new(width, hidden) if lost else None, parts)

    @exact_products()
    def add(self, input_TF: Tensor, lost_TD: Tensor | None, *, inherited_TD: Tensor, fold: int) -> None:
        """Add a batch of one fold; ``lost_TD`` is None in all batches or in none."""
        part = self.folds[fold]
        add_gram(part.gram_FF, input_TF)
        self.inherited_FD.addmm_(input_TF.T, inherited_TD)
        wanted_TS = inherited_TS = inherited_TD @ self.sketch_DS
        part.inherited_FS.addmm_(input_TF.T, inherited_TS)
        if lost_TD is not None:
            assert self.lost_FD is not None, "given in the first batch too"
            assert part.lost_FS is not None
            lost_TD = lost_TD.float()
            self.lost_FD.addmm_(input_TF.T, lost_TD)
            lost_TS = lost_TD @ self.sketch_DS
            part.lost_FS.addmm_(input_TF.T, lost_TS)
            wanted_TS = inherited_TS + lost_TS
        part.energy.add_(float64_sum(wanted_TS.square()))

    def tensors(self) -> list[Tensor]:
        """Return the sums themselves: adding to them in place adds to the equations."""
        by_fold = [tensor for fold in self.folds for tensor in fold]
        return [tensor for tensor in (self.lost_FD, self.inherited_FD, *by_fold) if tensor is not None]
