"""Inputs of output projections whose order is free: MLP neurons, and value channels within a head.

A permutation of the neurons, applied to the rows of the gate and up projections and to the columns of the down
projection, leaves the layer's function as it is. So does a permutation of the value channels of a key-value head,
applied to the rows of the value projection and to the columns of the output projection in all query heads of its group.
The result is an ordinary layer. With an N:M pattern the order decides which weights compete for a place
(``sparsity/input_order.py``).

Shapes: S sets of channels with an order of their own (one in an MLP, one for each key-value head), Q query heads of a
set (one in an MLP), C channels of a set, O outputs of a projection, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.names import tensor_of
from llmprune.common.distributed import broadcast_from_first
from llmprune.recipe.sparsity import Sparsity


@dataclass(frozen=True)
class ChannelSource:
    """Entries of the channels along a dimension of a tensor that computes them, int64 [S, C]."""

    name: str
    dim: int
    rows_SC: Tensor


@dataclass(frozen=True)
class FreeChannels:
    """Inputs of one output projection whose order is free within sets.

    ``columns_SQC``: the projection's inputs; ``sources``: the tensors whose entries are permuted along.
    """

    columns_SQC: Tensor
    sources: tuple[ChannelSource, ...]

    @property
    def modules(self) -> frozenset[str]:
        """Modules of the layer that hold the tensors that are permuted along."""
        return frozenset(source.name.rpartition(".")[0] for source in self.sources)

    def fits(self, group: int) -> bool:
        """Check that groups of ``group`` neighbours do not cross the border of a set, and that a set has several."""
        channels = self.columns_SQC.shape[2]
        return channels % group == 0 and channels > group

    def order(self, scores_OI: Tensor, *, sparsity: Sparsity) -> Tensor:
        """Return the order of each set that retains most importance, int64 [S, C], the same in every process."""
        orders = [
            sparsity.best_order(scores_OI[:, columns_QC.to(scores_OI.device)].flatten(0, 1))
            for columns_QC in self.columns_SQC
        ]
        return broadcast_from_first(torch.stack(orders))

    def inputs(self, order_SC: Tensor) -> Tensor:
        """Return the order of all inputs of the projection, int64 [I]."""
        ordered_SQC = self.columns_SQC.gather(2, order_SC[:, None].expand_as(self.columns_SQC))
        order_I = torch.empty(self.columns_SQC.numel(), dtype=torch.int64)
        return order_I.scatter_(0, self.columns_SQC.flatten(), ordered_SQC.flatten())

    def permute_sources(self, layer: nn.Module, order_SC: Tensor) -> None:
        """Permute the channels in the tensors that compute them, in place."""
        for source in self.sources:
            tensor = tensor_of(layer, source.name)
            index = torch.arange(tensor.shape[source.dim])
            index[source.rows_SC.flatten()] = source.rows_SC.gather(1, order_SC).flatten()
            tensor.data = tensor.index_select(source.dim, index.to(tensor.device))
