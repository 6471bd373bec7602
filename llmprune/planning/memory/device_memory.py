"""Plan the memory of each device, and choose the number of windows that go through a layer at a time.

A device that computes layers holds the weights outside the layers (embeddings, head), one layer dense and cut, on a GPU
also the next one, which is copied ahead, the statistics of a layer, and the activations of a batch. What is left of a
GPU is for the hidden states of all windows, which would otherwise be copied for every layer, and then for layers that
stay on it between the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmprune.common.schema import format_size
from llmprune.planning.memory.activations import TokenActivations
from llmprune.planning.memory.machine import Device, Machine
from llmprune.results.figures.base import Figures

ON_CPU = 4  # windows at a time on the CPU, where more are no faster
_MOST_WINDOWS, _MOST_TOKENS = 64, 2**14  # of a batch: more would not keep a GPU busier
# Share of the free memory that is planned with. The rest is for what the estimates leave out: fragments of the
# allocator, kernels that are loaded at first use, NCCL's buffers, and workspaces of cuBLAS, of which torch gives each
# thread that multiplies 32 MiB on Hopper and 8 MiB on others (aten/src/ATen/cuda/CublasHandlePool.cpp). The context
# itself is not in the free memory, because asking for that makes it.
_SHARE = 0.9


class DeviceMemory(Figures):
    """Bytes of one device: what it has, and what the run plans to use. The main memory is the device ``cpu``.

    Several processes on a machine have equal shares of its main memory.
    """

    device: str
    total: int
    free: int  # when the plan was made
    outside: int = 0  # weights outside the layers
    layers: int = 0  # one layer, dense and cut, and the next one
    statistics: int = 0  # of one layer
    activations: int = 0  # of one batch
    hidden_states: int = 0  # those of all windows that are kept here
    resident: int = 0  # layers that can stay here between the passes

    @property
    def index(self) -> int | None:
        """Number of a GPU; None for the main memory."""
        _, _, number = self.device.partition(":")
        return int(number) if number else None

    @property
    def working(self) -> int:
        """Bytes that the run needs here besides the layers that can stay."""
        return self.outside + self.layers + self.statistics + self.activations + self.hidden_states


class BatchSizes(Figures):
    """Windows that a layer processes at a time, of the calibration and of the held-out text.

    ``largest``, ``largest_held_out``: the most that fit every device.
    """

    calibration: int
    held_out: int
    largest: int
    largest_held_out: int


@dataclass(frozen=True)
class WorkingSet:
    """Bytes that a run works with on any machine.

    ``model``: all dense layers; ``layer``, ``cut``: the largest dense and the largest pruned layer; ``statistics``: of
    one layer; ``hidden_states``: those of all windows of a process; ``buffer``: one kind of them.
    """

    outside: int
    model: int
    layer: int
    cut: int
    statistics: int
    hidden_states: int
    buffer: int

    @property
    def least(self) -> int:
        """Bytes that a device needs for any layer, however few windows it processes at a time."""
        return self.outside + self.layer + self.cut + self.statistics


@dataclass(frozen=True)
class Windows:
    """Token windows of one process. ``batch_size``: the recipe's, None for the one that is chosen."""

    number: int
    length: int
    batch_size: int | None

    @property
    def most(self) -> int:
        """Return the largest batch that is chosen, a power of two."""
        tokens = max(_MOST_TOKENS // self.length, 1)
        all_windows = 1 << (self.number - 1).bit_length()
        return min(_MOST_WINDOWS, 1 << (tokens.bit_length() - 1), all_windows)

    def tokens(self, batch: int) -> int:
        """Return the tokens of a batch."""
        return min(batch, self.number) * self.length


@dataclass(frozen=True)
class MemoryPlanner:
    """Plans the memory of the devices of one process.

    ``held_out``: None where no text is held out; ``stream_memory``: most bytes of a buffer of hidden states that is
    kept in main memory.
    """

    machine: Machine
    working: WorkingSet
    activations: TokenActivations
    calibration: Windows
    held_out: Windows | None
    stream_memory: int

    def batch_sizes(self) -> BatchSizes:
        """Return the recipe's batch sizes, and for those to be chosen the most windows that fit every device."""
        largest = self._largest(self.calibration, self.activations.calibration)
        chosen = self.calibration.batch_size or (largest if self.machine.has_gpu else ON_CPU)
        later, fitting = chosen, largest
        if self.held_out is not None:
            fitting = self._largest(self.held_out, self.activations.held_out)
            later = self.held_out.batch_size or (fitting if self.machine.has_gpu else ON_CPU)
        return BatchSizes(
            calibration=chosen,
            held_out=later,
            largest=max(largest, ON_CPU),
            largest_held_out=max(fitting, ON_CPU),
        )

    def devices(self, batches: BatchSizes) -> tuple[DeviceMemory, ...]:
        """Return the memory of each device that computes, and where these are GPUs the main memory beside them."""
        computing = tuple(self._computing(device, batches) for device in self.machine.devices)
        if not self.machine.has_gpu:
            return computing
        host, copied = self.machine.host, self.working.hidden_states - min(device.hidden_states for device in computing)
        staged = 2 * self.working.layer  # buffers that layers are copied from
        hidden_states = self._in_memory(copied)
        return (
            *computing,
            DeviceMemory(device="cpu", total=host.total, free=host.free, layers=staged, hidden_states=hidden_states),
        )

    def shortage(self) -> str | None:
        """Return why no batch fits a device: its memory, the need and the remedy; None where one may fit."""
        for device in self.machine.devices:
            if device.total < self.working.least:
                return _shortage(device, self.working)
        return None

    def _largest(self, windows: Windows, activations: Callable[[int], int]) -> int:
        """Return the most windows, a power of two, whose activations fit every device beside the rest."""
        batch = windows.most
        while batch > 1 and any(
            self._fixed(device) + activations(windows.tokens(batch)) > _SHARE * device.free
            for device in self.machine.devices
        ):
            batch //= 2
        return batch

    def _fixed(self, device: Device) -> int:
        """Return the bytes that do not depend on the batch, nor on the number of windows."""
        return self.working.least + (self.working.layer if device.is_gpu else 0)

    def _computing(self, device: Device, batches: BatchSizes) -> DeviceMemory:
        working = self.working
        activations = self.activations.calibration(self.calibration.tokens(batches.calibration))
        if self.held_out is not None:
            activations = max(activations, self.activations.held_out(self.held_out.tokens(batches.held_out)))
        memory = DeviceMemory(
            device=device.name,
            total=device.total,
            free=device.free,
            outside=working.outside,
            layers=self._fixed(device) - working.outside - working.statistics,
            statistics=working.statistics,
            activations=activations,
        )
        if not device.is_gpu:
            return memory.model_copy(update={"hidden_states": self._in_memory(working.hidden_states)})
        left = max(int(_SHARE * device.free) - memory.working, 0)
        hidden_states = min(working.hidden_states, left)
        resident = min(working.model, left - hidden_states) if self.machine.keeps_layers else 0
        return memory.model_copy(update={"hidden_states": hidden_states, "resident": resident})

    def _in_memory(self, hidden_states: int) -> int:
        """Return the bytes of hidden states in main memory; buffers above the recipe's limit are in a file."""
        return hidden_states if self.working.buffer <= self.stream_memory else 0


def _shortage(device: Device, working: WorkingSet) -> str:
    weights = working.layer + working.cut
    if working.statistics > weights:
        remedy = "choose a width.criterion or a refit with smaller statistics, or sparsity.method wanda"
    else:
        remedy = "take a smaller model.dtype"
    other = "a machine with more memory"
    if device.is_gpu:
        other = "a GPU with more memory, or hide this one with CUDA_VISIBLE_DEVICES= to compute on the CPU"
    return (
        f"{device.name} has {format_size(device.total)}, and one layer needs {format_size(working.least)}: weights "
        f"dense and cut {format_size(weights)}, statistics {format_size(working.statistics)}, embeddings and head "
        f"{format_size(working.outside)}; {remedy}, or use {other}"
    )
