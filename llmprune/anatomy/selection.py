"""Select or mask neurons, key-value groups or experts in a tensor.

Shapes in names: D hidden size, E experts, F neurons, K neurons, groups or experts kept, R rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.anatomy.types import FusedSlice, PrunableDim
from llmprune.common.process_memory import empty_outside_heap


def select_neurons(tensor: Tensor, prunable: PrunableDim, *, keep: Tensor) -> Tensor:
    """Return a tensor with only the kept neurons (or groups) along the prunable dimension, in the order of ``keep``.

    ``keep``: int64 [K]; [E, K] for a tensor that stacks E experts, each of which keeps its own neurons.
    """
    keep = keep.to(tensor.device)
    if keep.ndim == 2:
        return _select_of_each(tensor, prunable, keep_EK=keep)
    return tensor.index_select(prunable.dim, rows_of(keep, tensor.shape[prunable.dim], prunable=prunable))


def select_along(tensors: Mapping[str, Tensor], keep: Mapping[str, tuple[int, Tensor]]) -> dict[str, Tensor]:
    """Return tensors with only the kept entries along one dimension. ``keep``: dimension and indices [K], by name."""
    return {
        name: tensor.index_select(keep[name][0], keep[name][1].to(tensor.device)) if name in keep else tensor
        for name, tensor in tensors.items()
    }


def _select_of_each(tensor: Tensor, prunable: PrunableDim, *, keep_EK: Tensor) -> Tensor:
    """Return a stacked tensor with the kept neurons of each expert, which are copied to the result once."""
    own = PrunableDim(prunable.name, prunable.dim - 1, prunable.parts)
    shape = list(tensor.shape)
    shape[prunable.dim] = keep_EK.shape[1] * sum(prunable.parts)
    on_cpu = tensor.device.type == "cpu"
    kept = empty_outside_heap(shape, tensor.dtype) if on_cpu else tensor.new_empty(shape)
    for part, kept_part, keep_K in zip(tensor, kept, keep_EK, strict=True):
        rows_R = rows_of(keep_K, part.shape[own.dim], prunable=own)
        torch.index_select(part, own.dim, rows_R, out=kept_part)
    return kept


def rows_of(keep_K: Tensor, size: int, *, prunable: PrunableDim) -> Tensor:
    """Return the indices of the kept neurons or groups, int64 [R], along a dimension of length ``size``."""
    count, start, rows = size // sum(prunable.parts), 0, []
    for entries in prunable.parts:
        rows.append(start + (keep_K.unsqueeze(1) * entries + torch.arange(entries, device=keep_K.device)).flatten())
        start += entries * count
    return torch.cat(rows)


def slice_rows(size: int, part: FusedSlice) -> Tensor:
    """Return the indices of one slice's entry of every neuron, int64 [F], along a dimension of length ``size``."""
    count, start, entry = size // sum(part.tensor.parts), 0, part.entry
    for entries in part.tensor.parts:
        if entry < entries:
            return start + torch.arange(count) * entries + entry
        start, entry = start + entries * count, entry - entries
    raise IndexError(f"{part.tensor.name} has {sum(part.tensor.parts)} entries of each neuron")


def outputs_first(matrix: Tensor, output: PrunableDim) -> Tensor:
    """Convert between [D, F] and the layout of an output projection's weight, in either direction: a view."""
    return matrix if output.dim == 1 else matrix.T


def neuron_rows(tensor: Tensor, prunable: PrunableDim) -> Tensor:
    """Return a tensor with one row a neuron [F, …]; gate and up of a fused projection are in the same row."""
    rows = tensor.movedim(prunable.dim, 0)
    count = len(rows) // sum(prunable.parts)
    blocks = torch.split(rows, [entries * count for entries in prunable.parts])
    return torch.cat([block.reshape(count, -1, *rows.shape[1:]) for block in blocks], dim=1)


def mask_neurons(tensor: Tensor, prunable: PrunableDim, *, keep: Tensor) -> Tensor:
    """Return a tensor with zeros for all but the kept neurons. ``keep``: as in ``select_neurons``."""
    if keep.ndim == 2:
        own = PrunableDim(prunable.name, prunable.dim - 1, prunable.parts)
        return torch.stack([mask_neurons(part, own, keep=keep_K) for part, keep_K in zip(tensor, keep, strict=True)])
    rows = rows_of(keep, tensor.shape[prunable.dim], prunable=prunable)
    return torch.zeros_like(tensor).index_copy_(prunable.dim, rows, tensor.index_select(prunable.dim, rows))
