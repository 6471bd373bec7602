"""Memory of the devices that compute a run, as this process sees them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from llmprune.checkpoint.placement import gpus_of
from llmprune.common.distributed import local_device, world_size
from llmprune.common.machine_memory import free_memory, machine_memory
from llmprune.recipe.model import ModelSource


@dataclass(frozen=True)
class Device:
    """Bytes of memory of a device, all and those that are free."""

    name: str
    total: int
    free: int

    @property
    def is_gpu(self) -> bool:
        """True for a device with memory of its own."""
        return self.name != "cpu"


@dataclass(frozen=True)
class Machine:
    """Devices that compute this process's layers, and its share of the main memory.

    ``host``: main memory, divided by the processes on this machine; the only device where there is no GPU.
    ``processes``: number that share the calibration windows, on all machines. ``keeps_layers``: False where the recipe
    leaves all layers to the CPU, so that a GPU only computes them.
    """

    devices: tuple[Device, ...]
    host: Device
    processes: int = 1
    keeps_layers: bool = True

    @property
    def has_gpu(self) -> bool:
        """True where GPUs compute."""
        return self.devices[0].is_gpu


def this_machine(source: ModelSource) -> Machine:
    """Return the devices that compute the layers of a model in this process, with their free memory.

    Layers that stay on no GPU are computed on the process's own, if it has one.
    """
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
    host = Device("cpu", machine_memory() // on_machine, free_memory() // on_machine)
    own = [local_device().index or 0] if torch.cuda.is_available() else []
    gpus = tuple(map(_gpu, gpus_of(source) or own))
    return Machine(gpus or (host,), host, world_size(), keeps_layers=source.device_map != "cpu")


def _gpu(index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    return Device(f"cuda:{index}", total, free)
