"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): what one weight's removal breaks, those after it repair.

Inputs are visited in order. With U the upper Cholesky factor of (XᵀX + λ mean diag(XᵀX) I)⁻¹,

    score of weight w_i = (w_i / U_ii)²

is what its removal costs once the weights of later inputs make up for it; those that go are taken off as

    w_j ← w_j − (w_i / U_ii) U_ij        for j ≥ i

for all outputs at once. The mask of a group is chosen when its first input is reached; without groups, that of
``_BLOCK`` inputs over all outputs together, as the authors do.

Shapes: O outputs of a matrix, I inputs, B inputs of a block, M of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from llmprune.common.linalg.cholesky import inverse, no_inverse
from llmprune.sparsity.method import DAMPING, Needs, SparsityMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern

_BLOCK = 128  # inputs whose effect on later blocks is applied in one product


class SparseGPT(SparsityMethod):
    """``method: {kind: sparsegpt}``; with ``refit: false`` it is the authors' method."""

    needs: ClassVar[Needs] = "gram"

    kind: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, gt=0, description=DAMPING)

    def prune(self, weight_OI: Tensor, sums: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Choose and repair from the first input to the last."""
        from llmprune.common.threads import one_thread

        assert sums is not None, "it reads the inputs' Gram matrix"
        factor_II = _inverse_factor(sums, self.damping)
        with one_thread():
            return self._in_order(weight_OI, factor_II, pattern=pattern)

    def _in_order(self, weight_OI: Tensor, factor_II: Tensor, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        weight_IO = weight_OI.T.float().contiguous()
        mask_IO = weight_IO.new_empty(weight_IO.shape).bool()
        for start in range(0, len(weight_IO), _block(pattern)):
            block = slice(start, start + _block(pattern))
            errors_BO = _prune_block(
                weight_IO[block], mask_IO[block], factor_BB=factor_II[block, block], pattern=pattern
            )
            weight_IO[block.stop :].addmm_(factor_II[block, block.stop :].T, errors_BO, alpha=-1)
        return (weight_IO * mask_IO).T.contiguous(), mask_IO.T.contiguous()


def _block(pattern: Pattern) -> int:
    return _BLOCK if pattern.of is None else max(_BLOCK // pattern.of, 1) * pattern.of


def _prune_block(weight_BO: Tensor, mask_BO: Tensor, *, factor_BB: Tensor, pattern: Pattern) -> Tensor:
    """Prune some neighbouring inputs in place; returns w_i / U_ii of what went, by which later inputs change."""
    import torch

    size = len(weight_BO)
    errors_BO = torch.empty_like(weight_BO)
    scales_B = factor_BB.diagonal()
    step = pattern.of or size
    for start in range(0, size, step):
        group = slice(start, start + step)
        weight_MO, errors_MO = weight_BO[group], errors_BO[group]
        mask_BO[group] = _choose((weight_MO / scales_B[group, None]).square_(), pattern)
        gone_MO = ~mask_BO[group]
        for offset, (weight_O, gone_O) in enumerate(zip(weight_MO, gone_MO, strict=True)):
            place = start + offset
            torch.mul(weight_O, gone_O, out=errors_MO[offset]).div_(scales_B[place])
            following = factor_BB[place, place + 1 : group.stop]
            weight_MO[offset + 1 :].addr_(following, errors_MO[offset], alpha=-1)
        weight_BO[group.stop :].addmm_(factor_BB[group, group.stop :].T, errors_MO, alpha=-1)
    return errors_BO


def _choose(scores_BO: Tensor, pattern: Pattern) -> Tensor:
    """What stays of a group of inputs, or of a block of them over all outputs, bool [B, O]."""
    import torch

    if pattern.of is not None:
        return pattern.mask(scores_BO.T).T
    gone = round(pattern.share * scores_BO.numel())
    mask_BO = torch.ones_like(scores_BO, dtype=torch.bool)
    mask_BO.view(-1)[scores_BO.reshape(-1).topk(gone, largest=False, sorted=False).indices] = False
    return mask_BO


def _inverse_factor(gram_II: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with UᵀU = (XᵀX + λ mean diag(XᵀX) I)⁻¹."""
    import torch

    gram_II = gram_II.float()
    upper_II: Tensor
    inverse_II = inverse(gram_II, (damping * gram_II.diagonal().mean()).clamp_min(1e-30))
    upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
    if int(failed) or not torch.isfinite(upper_II).all():
        raise no_inverse(len(gram_II))
    return upper_II
