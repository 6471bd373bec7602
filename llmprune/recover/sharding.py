"""Parameters divided over the processes by torch's FSDP2; whole in a single process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llmprune.common.distributed import mesh_of_processes, world_size


class Sharding:
    """Division of the parameters of models over the processes of this run."""

    def __init__(self) -> None:
        self._mesh = mesh_of_processes() if world_size() > 1 else None

    def shard(self, module: nn.Module) -> None:
        """Leave this process its part of each parameter that no module inside has divided already.

        They are put together for each call of the module, and only for that: parts that a state is read into count
        at the next.
        """
        if self._mesh is not None:
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True)

    def autocast(self, device: torch.device, *, quick: bool) -> AbstractContextManager[Any]:
        """Return the context of products in bfloat16, where they are quick.

        Processes compute alike, whatever their number: parts are put together in float32. The cache of autocast would
        hold a copy of all weights beside the parts.
        """
        if not quick:
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=self._mesh is None)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    if isinstance(tensor, DTensor):
        part: Tensor = tensor.to_local()
        return part
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together; every process calls it."""
    if isinstance(tensor, DTensor):
        together: Tensor = tensor.full_tensor()
        return together
    return tensor
