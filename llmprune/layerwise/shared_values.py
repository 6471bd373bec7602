"""Single copies of the tensors that repeat over layers and batches in the arguments of layer calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmprune.common.pinned_memory import pinning
from llmprune.layerwise.layer_calls import DeviceCopies, LayerCall, are_equal, tensors_in


class SharedValues:
    """Single copies of equal tensors: masks and rotary embeddings repeat over layers and batches.

    Tensors of the first batch are kept on their device. A tensor of a later batch is compared with the first batch's
    at the same place. Those that differ (computed from tokens, such as Gemma 4's per-layer inputs) are kept in host
    memory, so that GPU memory does not grow with the batches. The host waits for a device once a batch.
    """

    def __init__(self) -> None:
        self._first: dict[int, Tensor] = {}  # the first batch's tensors by their place in the calls
        self._copies = DeviceCopies()

    def share(self, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """Return the calls of one batch, with each tensor replaced by an equal one that is kept already."""
        tensors = tensors_in([(call.args, call.kwargs) for call in calls])
        own = {id(tensor): (place, tensor) for place, tensor in reversed(list(enumerate(tensors)))}
        kept = self._share_with_first(own) if self._first else _share_among(list(own.values()))
        if not self._first:
            self._first = {place: kept[id(tensor)] for place, tensor in enumerate(tensors)}
            for tensor in kept.values():
                self._copies.keep(tensor)
        return [
            LayerCall(_replaced(call.args, kept), _replaced(call.kwargs, kept), copies=self._copies) for call in calls
        ]

    def _share_with_first(self, own: Mapping[int, tuple[int, Tensor]]) -> dict[int, Tensor]:
        pairs = [(tensor, self._first.get(place, tensor)) for place, tensor in own.values()]
        return {
            key: first if first is not tensor and equal else _to_host(tensor)
            for key, (tensor, first), equal in zip(own, pairs, _equal_pairs(pairs), strict=True)
        }


def _share_among(own: Sequence[tuple[int, Tensor]]) -> dict[int, Tensor]:
    tensors = [tensor for _, tensor in sorted(own, key=lambda one: one[0])]
    pairs = [(first, second) for number, second in enumerate(tensors) for first in tensors[:number]]
    kept = {id(tensor): tensor for tensor in tensors}
    for (first, second), equal in zip(pairs, _equal_pairs(pairs), strict=True):
        if equal and kept[id(second)] is second:
            kept[id(second)] = kept[id(first)]
    return kept


def _equal_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Compare pairs of tensors, also by shape, type and device; the host waits for each device once."""
    equal = [False] * len(pairs)
    flags: dict[torch.device, dict[int, Tensor]] = {}
    for number, (first, second) in enumerate(pairs):
        if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
            continue
        if first is second or first.device.type == "cpu":
            equal[number] = are_equal(first, second)
        else:
            flags.setdefault(first.device, {})[number] = (first == second).all()
    for found in flags.values():
        for number, flag in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            equal[number] = flag
    return equal


def _replaced(value: Any, kept: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return kept[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, kept) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, kept) for key, item in value.items()}
    return value


def _to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to host memory; that of a CUDA device without waiting, so that only its stream may use it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    with pinning():
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.contiguous(), non_blocking=True)
