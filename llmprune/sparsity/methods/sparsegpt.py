"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): later weights compensate for each pruned weight.

Inputs are visited in order. With U the upper Cholesky factor of (XᵀX + λ mean diag(XᵀX) I)⁻¹,

    score of weight w_i = (w_i / U_ii)²

is the cost of its removal after the weights of later inputs compensate for it. Pruned weights are removed by

    w_j ← w_j − (w_i / U_ii) U_ij        for j ≥ i

for all outputs at once. The mask of a group is chosen at its first input; without groups, that of ``_BLOCK`` inputs
over all outputs together, as in the authors' code.

Shapes: O outputs of a matrix, I inputs, B inputs of a block, M of a group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from llmprune.common.linalg.cholesky import factorize, inverse, mean_diagonal, singular
from llmprune.sparsity.method import CompensatingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.sparsity.pattern import Pattern

_BLOCK = 128  # inputs whose effect on later blocks is applied in one product
_SETTING = "sparsity.method.damping"


class SparseGPT(CompensatingMethod):
    """``method: {kind: sparsegpt}``; with ``refit: false`` it is the authors' method."""

    kind: Literal["sparsegpt"] = "sparsegpt"

    def prune(self, weight_OI: Tensor, moments: Tensor | None, *, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Choose weights and compensate for them from the first input to the last."""
        from llmprune.common.threads import one_thread

        assert moments is not None, "required"
        factor_II = _inverse_factor(moments, self.damping)
        with one_thread():
            return self._in_order(weight_OI, factor_II, pattern=pattern)

    def operations(self, outputs: int, inputs: int) -> float:
        """Return the operations of the inverse, of its factor, and of the compensations."""
        return 4 / 3 * inputs**3 + 1.0 * outputs * inputs**2

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
    """Prune neighbouring inputs in index; return w_i / U_ii of the pruned weights, 0 of others [B, O]."""
    import torch

    size = len(weight_BO)
    errors_BO = torch.empty_like(weight_BO)
    scales_B = factor_BB.diagonal()
    step = pattern.of or size
    for start in range(0, size, step):
        group = slice(start, start + step)
        weight_MO, errors_MO = weight_BO[group], errors_BO[group]
        mask_BO[group] = _choose((weight_MO / scales_B[group, None]).square_(), pattern)
        is_pruned_MO = ~mask_BO[group]
        for offset, (weight_O, is_pruned_O) in enumerate(zip(weight_MO, is_pruned_MO, strict=True)):
            index = start + offset
            torch.mul(weight_O, is_pruned_O, out=errors_MO[offset]).div_(scales_B[index])
            following = factor_BB[index, index + 1 : group.stop]
            weight_MO[offset + 1 :].addr_(following, errors_MO[offset], alpha=-1)
        weight_BO[group.stop :].addmm_(factor_BB[group, group.stop :].T, errors_MO, alpha=-1)
    return errors_BO


def _choose(scores_BO: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of the kept weights of a group of inputs, or of a block over all outputs, bool [B, O]."""
    import torch

    if pattern.of is not None:
        return pattern.mask(scores_BO.T).T
    pruned = round(pattern.share * scores_BO.numel())
    mask_BO = torch.ones_like(scores_BO, dtype=torch.bool)
    mask_BO.view(-1)[scores_BO.reshape(-1).topk(pruned, largest=False, sorted=False).indices] = False
    return mask_BO


def _inverse_factor(gram_II: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with UᵀU = (XᵀX + λ mean diag(XᵀX) I)⁻¹."""
    gram_II = gram_II.float()
    inverse_II = inverse(gram_II, mean_diagonal(gram_II, damping), setting=_SETTING)
    upper_II = factorize(inverse_II, upper=True)
    if upper_II is None or not upper_II.isfinite().all():
        raise singular(len(gram_II), _SETTING)
    return upper_II
