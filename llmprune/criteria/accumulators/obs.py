"""Algebra of the criterion ``obs``: the order in which neurons are removed, and the output error after each removal.

With G = XᵀX / T over the calibration tokens and H = G + μI, the error of removing a set R of neurons while the
weights of the others change by Δ is

    E(R) = min over Δ   ‖ X (Ŵ − W)ᵀ ‖² / T + μ ‖ Δ ‖²         Ŵ = W + Δ, but 0 in R

which is what the refit minimises. Removing one more neuron f adds ‖ w_f ‖² / [H⁻¹]_ff − μ ‖ w⁰_f ‖², where w_f is its
column after the earlier compensations, w⁰_f the original one, and H⁻¹ the inverse over the remaining neurons. The
removal downdates both:

    H⁻¹ ← H⁻¹ − v vᵀ       v = [H⁻¹]_:f / √[H⁻¹]_ff
    W   ← W − u vᵀ         u = w_f / √[H⁻¹]_ff

Of W only A = WᵀW is needed. Removals are collected in blocks: within a block only the chosen columns and both diagonals
are updated, after it the matrices of the remaining neurons, in one product. The order is that of greedy removal neuron
by neuron, at the speed of matrix products.

Groups of inputs (of attention heads) are removed together: with the columns W_B of a group B and K = ([H⁻¹]_BB)⁻¹ a
removal adds tr(W_B K W_Bᵀ) − μ ‖ W⁰_B ‖², and H⁻¹ ← H⁻¹ − C K Cᵀ, W ← W − W_B K Cᵀ with C = [H⁻¹]_:B.

Time: about 4 F³ operations in float64; on one core of a small machine 1.2 s for 1,536 neurons and 21 s for 4,096, so
minutes for 11,008. Memory: four F × F matrices in float64 in addition to the sums.

No removal waits for the device: its index stays there, and whether all have succeeded is checked at the end. Where
float64 matrices are slow the algebra runs on the CPU. Float32 is no substitute: of the first quarter of 1,536 neurons
(correlated, with a few large tokens) up to a tenth were others than in float64.

Shapes: T tokens, D hidden size, F neurons of a unit, N of them remaining, K removed in one block, M kept after it,
G groups of S inputs, R of them remaining.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.common.errors import NumericalError
from llmprune.common.linalg.cholesky import factorize, mean_diagonal
from llmprune.common.linalg.gram import add_gram, mirror
from llmprune.common.linalg.precision import float64_matrix_device
from llmprune.criteria.accumulators.base import UnitAccumulator

_TOGETHER = 64  # removals in one block


class ObsAccumulator(UnitAccumulator):
    """Scores of the neurons of one unit from its Gram matrix XᵀX [F, F], summed over tokens in float32."""

    def __init__(self, output_DF: Tensor, ridge: float, *, shrinkage: float) -> None:
        self.output_DF, self.ridge, self.shrinkage = output_DF, ridge, shrinkage
        width = output_DF.shape[1]
        self.gram_FF = output_DF.new_zeros(width, width, dtype=torch.float32)
        self.tokens = self.gram_FF.new_zeros(1)

    def reducible_state(self) -> list[Tensor]:
        """Return XᵀX [F, F], of which only the upper triangle is valid, and the number of tokens [1]."""
        return [self.gram_FF, self.tokens]

    def update(self, values_BLF: Tensor) -> None:
        """Add a batch of activations."""
        values_TF = values_BLF.flatten(0, -2).float()
        add_gram(self.gram_FF, values_TF)
        self.tokens += values_TF.shape[0]

    def scores(self) -> Tensor:
        """Return the mean squared error of the output after the removal of each neuron [F]; overwrites the sums."""
        order_F, errors_F = removal_order(self._gram(), self._output(), ridge=self.ridge)
        return torch.empty_like(errors_F).index_copy_(0, order_F, errors_F).float()

    def group_scores(self, size: int) -> Tensor:
        """Return the mean squared error of the output after the removal of each group [G]; overwrites the sums."""
        order_G, errors_G = group_order(self._gram(), self._output(), ridge=self.ridge, size=size)
        return torch.empty_like(errors_G).index_copy_(0, order_G, errors_G).float()

    def _gram(self) -> Tensor:
        mirror(self.gram_FF)
        device = float64_matrix_device(self.gram_FF.device)
        gram_FF = self.gram_FF.to(device).double().div_(self.tokens.clamp_min(1).to(device))
        energy_F = gram_FF.diagonal().clone()
        gram_FF.mul_(1 - self.shrinkage).diagonal().copy_(energy_F)
        return gram_FF

    def _output(self) -> Tensor:
        return self.output_DF.to(float64_matrix_device(self.output_DF.device)).double()


def removal_order(
    gram_FF: Tensor, output_DF: Tensor, *, ridge: float, together: int = _TOGETHER
) -> tuple[Tensor, Tensor]:
    """Return the neurons in the order of removal, int64 [F], and the error after each removal [F]; all in float64.

    ``together``: removals in one block. Overwrites ``gram_FF``. Raises NumericalError where it is not positive definite
    or not finite.
    """
    inverse_NN, damping = _damped_inverse(gram_FF, ridge)
    weights_NN = output_DF.T @ output_DF
    offset_N = damping * weights_NN.diagonal()
    remaining_N = torch.arange(len(inverse_NN), device=inverse_NN.device)
    order, costs = [], []
    while len(remaining_N):
        block = _Block(inverse_NN, weights_NN, offset_N=offset_N, removals=min(together, len(remaining_N)))
        removed_K, costs_K = block.remove()
        order.append(remaining_N[removed_K])
        costs.append(costs_K)
        kept_M = _others(removed_K, len(remaining_N))
        inverse_NN, weights_NN = block.without(kept_M)
        remaining_N, offset_N = remaining_N[kept_M], offset_N[kept_M]
    return torch.cat(order), _errors(torch.cat(costs))


def group_order(gram_FF: Tensor, output_DF: Tensor, *, ridge: float, size: int) -> tuple[Tensor, Tensor]:
    """Return the groups of ``size`` neighbouring inputs in the order of removal, int64 [G], and the error after each.

    All in float64, the errors [G]. Overwrites ``gram_FF``. Raises NumericalError as ``removal_order`` does.
    """
    inverse_FF, damping = _damped_inverse(gram_FF, ridge)
    weight_DF = output_DF.clone()
    offset_G = damping * output_DF.square().sum(0).view(-1, size).sum(1)
    inputs_GS = torch.arange(len(inverse_FF), device=inverse_FF.device).view(-1, size)
    remaining_R = torch.arange(len(offset_G), device=inverse_FF.device)
    order, costs = [], []
    while len(remaining_R):
        cost_R = _group_costs(inverse_FF, weight_DF, inputs_RS=inputs_GS[remaining_R]) - offset_G[remaining_R]
        cheapest_1 = cost_R.argmin(0, keepdim=True)
        costs.append(cost_R[cheapest_1])
        order.append(remaining_R[cheapest_1])
        part_S = inputs_GS[order[-1]][0]
        columns_FS = inverse_FF[:, part_S]
        shared_SF = _solve(columns_FS[part_S], columns_FS.T)
        weight_DF -= weight_DF[:, part_S] @ shared_SF
        inverse_FF.addmm_(columns_FS, shared_SF, alpha=-1)
        remaining_R = remaining_R[_others(cheapest_1, len(remaining_R))]
    return torch.cat(order), _errors(torch.cat(costs))


def _group_costs(inverse_FF: Tensor, weight_DF: Tensor, *, inputs_RS: Tensor) -> Tensor:
    """Return tr(W_B K W_Bᵀ) of each group [R]."""
    weight_RSD = weight_DF[:, inputs_RS].transpose(0, 1).contiguous().transpose(1, 2)
    solved_RSD = _solve(inverse_FF[inputs_RS[:, :, None], inputs_RS[:, None]], weight_RSD)
    return (weight_RSD * solved_RSD).sum((1, 2))


def _solve(matrix_SS: Tensor, value_SN: Tensor) -> Tensor:
    """Solve linear systems with blocks of H⁻¹ […, S, S]; NaN where a block is singular."""
    solved_SN, failed = torch.linalg.solve_ex(matrix_SS, value_SN)
    solution_SN: Tensor = solved_SN.where((failed == 0)[..., None, None], torch.nan)
    return solution_SN


def _others(removed_K: Tensor, count: int) -> Tensor:
    """Return the numbers up to ``count`` that are not removed, int64, in order; their number is known to the host."""
    is_removed_N = torch.zeros(count, dtype=torch.uint8, device=removed_K.device).index_fill_(0, removed_K, 1)
    return is_removed_N.argsort(stable=True)[: count - len(removed_K)]


def _errors(costs_N: Tensor) -> Tensor:
    """Return the errors from the cost of each removal. Raises NumericalError where a cost is not finite."""
    if not torch.isfinite(costs_N).all():
        raise _no_order()
    return costs_N.clamp_min(0).cumsum(0)


def _no_order() -> NumericalError:
    """Return the error for sums from which no order of removal can be computed."""
    return NumericalError(
        "obs finds no order of the neurons: too few or too similar calibration tokens, or sums that are not finite; "
        "raise width.criterion.ridge or calibration.samples"
    )


def _damped_inverse(gram_FF: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return H⁻¹, which replaces G in memory, and μ."""
    damping = mean_diagonal(gram_FF, ridge)
    gram_FF.diagonal().add_(damping)
    factor_FF = factorize(gram_FF)
    if factor_FF is None:
        raise _no_order()
    return torch.cholesky_inverse(factor_FF, out=gram_FF), damping


class _Block:
    """Consecutive removals with delayed updates: H⁻¹ − V Vᵀ and A − V Sᵀ − S Vᵀ.

    ``offset_N``: μ ‖ w⁰ ‖² of each neuron.
    """

    def __init__(self, inverse_NN: Tensor, weights_NN: Tensor, *, offset_N: Tensor, removals: int) -> None:
        self.inverse_NN, self.weights_NN, self.offset_N = inverse_NN, weights_NN, offset_N
        self.v_NK, self.s_NK = inverse_NN.new_zeros(2, len(inverse_NN), removals)

    def remove(self) -> tuple[Tensor, Tensor]:
        """Return the positions of the removed neurons, int64 [K], and the cost of each removal [K]."""
        inverse_N, weights_N = self.inverse_NN.diagonal().clone(), self.weights_NN.diagonal().clone()
        is_removed_N = torch.zeros_like(inverse_N, dtype=torch.bool)
        removed, costs = [], []
        for done in range(self.v_NK.shape[1]):
            cost_N = (weights_N / inverse_N - self.offset_N).masked_fill_(is_removed_N, torch.inf)
            cheapest_1 = cost_N.argmin(0, keepdim=True)
            removed.append(cheapest_1)
            costs.append(cost_N[cheapest_1])
            is_removed_N.index_fill_(0, cheapest_1, True)
            v_N, s_N = self._column(cheapest_1, done)
            self.v_NK[:, done], self.s_NK[:, done] = v_N, s_N
            inverse_N -= v_N.square()
            weights_N -= 2 * v_N * s_N
        return torch.cat(removed), torch.cat(costs)

    def _column(self, cheapest_1: Tensor, done: int) -> tuple[Tensor, Tensor]:
        """Return the columns that the next removal adds to V and S, after ``done`` removals."""
        v_NK, s_NK = self.v_NK[:, :done], self.s_NK[:, :done]
        v_K, s_K = v_NK[cheapest_1][0], s_NK[cheapest_1][0]
        column_N = self.inverse_NN[cheapest_1][0] - v_NK @ v_K
        products_N = self.weights_NN[cheapest_1][0] - v_NK @ s_K - s_NK @ v_K
        root_1 = column_N[cheapest_1].sqrt()
        v_N = column_N / root_1
        return v_N, (products_N - products_N[cheapest_1] / (2 * root_1) * v_N) / root_1

    def without(self, kept_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return H⁻¹ and A of the kept neurons, after the removals."""
        v_MK, s_MK = self.v_NK[kept_M], self.s_NK[kept_M]
        inverse_MM = self.inverse_NN[kept_M[:, None], kept_M]
        weights_MM = self.weights_NN[kept_M[:, None], kept_M]
        inverse_MM.addmm_(v_MK, v_MK.T, alpha=-1)
        weights_MM.addmm_(v_MK, s_MK.T, alpha=-1).addmm_(s_MK, v_MK.T, alpha=-1)
        return inverse_MM, weights_MM
