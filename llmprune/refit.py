"""The closed-form repair of what a cut breaks.

After a layer lost neurons, or its successors went, the weight W of an output
projection is solved again so that the pruned hidden states match the dense ones:

    minimise over W   ‖ X Wᵀ − (T − R) ‖² + λ · mean diag(XᵀX) · ‖ W − W₀ ‖²

X: the projection's inputs on the pruned stream; R: what its output is added to;
T: the dense hidden states to reach; W₀: the sliced weight. With E = T − R − X W₀ᵀ,
which is simply how far the pruned layer's output is from T, and W = W₀ + Δ:

    (XᵀX + μ I) Δᵀ = Xᵀ E        μ = λ · mean diag(XᵀX)

Ridge regression towards W₀; the normal equations need two sums over tokens.

Shapes: T tokens, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmprune.errors import NumericalError
from llmprune.schema import Section

if TYPE_CHECKING:
    from torch import Tensor


class Refit(Section):
    """``refit: {ridge: 0.1}``."""

    ridge: float = Field(0.1, ge=0, description="Pull towards the sliced weights, in units of the mean of diag(XᵀX).")

    def open(self) -> NormalEquations:
        """Start the sums of one projection."""
        return NormalEquations(self.ridge)


_BLOCKS = 4  # of columns: XᵀX is symmetric, and 10 of its 16 blocks are computed


class NormalEquations:
    """Sums XᵀX [F, F], its upper triangle at least, and XᵀE [F, D] over tokens, in float32."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge
        self.gram_FF: Tensor | None = None
        self.moment_FD: Tensor | None = None

    def update(self, input_TF: Tensor, error_TD: Tensor) -> None:
        """Take in the inputs of the projection and the error its output should make good."""
        input_TF, error_TD = input_TF.float(), error_TD.float()
        width = input_TF.shape[1]
        if self.gram_FF is None or self.moment_FD is None:
            self.gram_FF = input_TF.new_zeros(width, width)
            self.moment_FD = input_TF.new_zeros(width, error_TD.shape[1])
        step = -(-width // _BLOCKS)
        for start in range(0, width, step):
            rows = slice(start, start + step)
            self.gram_FF[rows, start:].addmm_(input_TF[:, rows].T, input_TF[:, start:])
        self.moment_FD.addmm_(input_TF.T, error_TD)

    def sums(self) -> list[Tensor]:
        """XᵀX and XᵀE themselves, for several processes to add up."""
        return [sums for sums in (self.gram_FF, self.moment_FD) if sums is not None]

    def solve(self) -> Tensor:
        """Δ [D, F], float32. Raises NumericalError where the equations have no stable solution."""
        import torch

        assert self.gram_FF is not None, "solved after at least one batch"
        assert self.moment_FD is not None
        gram_FF, moment_FD = self.gram_FF.double(), self.moment_FD.double()
        gram_FF.diagonal().add_(self.ridge * gram_FF.diagonal().mean())
        factor_FF, failed = torch.linalg.cholesky_ex(gram_FF, upper=True)  # reads the upper triangle
        delta_FD = torch.cholesky_solve(moment_FD, factor_FF, upper=True)
        if int(failed) or not torch.isfinite(delta_FD).all():
            raise NumericalError(
                f"the refit has no stable solution: {gram_FF.shape[0]} inputs and too few or too similar "
                f"calibration tokens for ridge {self.ridge:g}; raise refit.ridge or calibration.samples"
            )
        return delta_FD.T.float()
