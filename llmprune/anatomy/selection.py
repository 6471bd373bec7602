"""Keep some neurons or experts of a tensor.

Shapes in names: E experts, K neurons or experts kept, R rows of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.anatomy.value import TensorCut


def select_neurons(tensor: Tensor, cut: TensorCut, keep: Tensor) -> Tensor:
    """The tensor with only the kept neurons along the cut's dimension, in the order of ``keep``.

    ``keep``: int64 [K]; [E, K] where the tensor stacks E experts that keep neurons of their own.
    """
    keep = keep.to(tensor.device)
    if keep.ndim == 2:
        own = TensorCut(cut.name, cut.dim - 1, cut.layout)
        return torch.stack([select_neurons(part, own, keep_K) for part, keep_K in zip(tensor, keep, strict=True)])
    return tensor.index_select(cut.dim, _rows(keep, tensor.shape[cut.dim], cut))


def _rows(keep_K: Tensor, size: int, cut: TensorCut) -> Tensor:
    """Where the kept neurons lie [R] along a dimension of this size."""
    if cut.layout == "chunked":
        return torch.cat([keep_K, keep_K + size // 2])
    if cut.layout == "interleaved":
        return torch.stack([2 * keep_K, 2 * keep_K + 1], dim=1).flatten()
    return keep_K


def neuron_rows(tensor: Tensor, cut: TensorCut) -> Tensor:
    """A view of the tensor with a neuron a row [F, …]; gate and up of a fused projection lie in one row."""
    rows = tensor.movedim(cut.dim, 0)
    if cut.layout == "chunked":
        return rows.reshape(2, -1, *rows.shape[1:]).movedim(1, 0)
    if cut.layout == "interleaved":
        return rows.reshape(-1, 2, *rows.shape[1:])
    return rows


def mask_neurons(tensor: Tensor, cut: TensorCut, keep: Tensor) -> Tensor:
    """The tensor with zeros for all but the kept neurons. ``keep`` as in ``select_neurons``."""
    if keep.ndim == 2:
        own = TensorCut(cut.name, cut.dim - 1, cut.layout)
        return torch.stack([mask_neurons(part, own, keep_K) for part, keep_K in zip(tensor, keep, strict=True)])
    rows = _rows(keep, tensor.shape[cut.dim], cut)
    return torch.zeros_like(tensor).index_copy_(cut.dim, rows, tensor.index_select(cut.dim, rows))
