"""Memory of the devices that compute a run, as this process sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmprune.checkpoint.placement import gpus_of
from llmprune.common.distributed import local_device, processes_on_machine, world_size
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


def this_machine(source: ModelSource, *, starts: int = 1, elsewhere: bool = False) -> Machine:
    """Return the devices that compute the layers of a model in this process, with their free memory.

    Layers that stay on no GPU are computed on the process's own, if it has one. ``starts``: number of processes that
    will do the work in place of this one, each on a GPU of its own; the devices are then those of all of them.
    ``elsewhere``: the work will be done later, by another process; all memory of a GPU then counts as free, because
    asking for what is free takes memory on it.
    """
    on_machine = starts if starts > 1 else processes_on_machine()
    host = Device("cpu", machine_memory() // on_machine, free_memory() // on_machine)
    indices = range(starts) if starts > 1 else _computing_gpus(source)
    gpus = tuple(_gpu(index, elsewhere=elsewhere) for index in indices) if torch.cuda.is_available() else ()
    processes = starts if starts > 1 else world_size()
    return Machine(gpus or (host,), host, processes, keeps_layers=source.device_map != "cpu")


def _computing_gpus(source: ModelSource) -> Sequence[int]:
    """Return the numbers of the GPUs that layers stay on, and the process's own where some stay on none."""
    staying, own = gpus_of(source), local_device().index or 0
    devices = source.device_map.values() if isinstance(source.device_map, dict) else ()
    return sorted({*staying, own}) if not staying or {"cpu", "disk"} & set(devices) else staying


def _gpu(index: int, *, elsewhere: bool) -> Device:
    if elsewhere:
        size = torch.cuda.get_device_properties(index).total_memory
        return Device(f"cuda:{index}", size, size)
    free, total = torch.cuda.mem_get_info(index)
    return Device(f"cuda:{index}", total, free)
