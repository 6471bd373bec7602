"""Functions of ``torch.cuda`` and ``torch.accelerator`` as they answer with simulated devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.devices.mode import SimulatedDevices
from helpers.devices.storages import CPU, state_of
from helpers.devices.streams import SimulatedEvent, SimulatedStream

MEMORY = 64 << 30  # bytes that a device has unless told otherwise


class _Generator(torch.Generator):
    """Generator on a simulated device; its numbers are those of the CPU."""

    def __new__(cls, device: Any = CPU) -> _Generator:
        made: _Generator = super().__new__(cls)
        made.home = torch.device(device)
        return made

    def __init__(self, device: Any = CPU) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.home


def _record_stream(tensor: Tensor, stream: SimulatedStream) -> None:
    """Keep the memory of a tensor, when it is freed, until what is on the stream is done."""
    state = state_of(tensor)
    if state is not None:
        state.recorded.add(stream.number)


@contextmanager
def simulated_devices(
    count: int, *, memory: int | Sequence[int] = MEMORY, float64: bool = True
) -> Iterator[SimulatedDevices]:
    """Give torch ``count`` CUDA devices, in this thread and in those of thread pools.

    ``memory``: bytes of every device, or of each. ``float64``: False for devices that lack it.
    """
    devices = SimulatedDevices([memory] * count if isinstance(memory, int) else memory, has_float64=float64)
    submit = ThreadPoolExecutor.submit

    def submit_with_devices(
        pool: ThreadPoolExecutor, task: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Future[Any]:
        def run() -> Any:
            with devices:
                return task(*args, **kwargs)

        return submit(pool, run)

    SimulatedStream.timelines.append(devices.timeline)
    with ExitStack() as undo:
        undo.callback(SimulatedStream.timelines.pop)
        undo.enter_context(patch.multiple(torch.cuda, **_functions(devices), **_stream_functions(devices)))
        accelerator = _stream_functions(devices)
        for name in ("current_stream", "set_stream", "synchronize"):
            undo.enter_context(patch.object(torch.accelerator, name, accelerator[name]))
        undo.enter_context(patch.object(torch.accelerator, "empty_host_cache", devices.pinned.empty_cache, create=True))
        undo.enter_context(patch.object(torch, "Stream", SimulatedStream))
        undo.enter_context(patch.object(torch, "Event", SimulatedEvent))
        undo.enter_context(patch.object(Tensor, "record_stream", _record_stream))
        undo.enter_context(patch.object(torch, "Generator", _Generator))
        undo.enter_context(patch.object(ThreadPoolExecutor, "submit", submit_with_devices))
        undo.enter_context(devices)
        yield devices


# Functions that answer the same for all devices.
_ALIKE: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "get_device_name": lambda device=None: "simulated",
    "get_device_capability": lambda device=None: (9, 0),
    "empty_cache": lambda: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.empty(0, dtype=torch.uint8),  # the CPU's numbers are drawn
    "set_rng_state": lambda state, device=None: None,
}


def _functions(devices: SimulatedDevices) -> dict[str, Any]:
    def named(device: Any) -> str:
        return str(devices.named("cuda" if device is None else device))

    def bytes_on(counter: Counter[str]) -> Callable[..., int]:
        return lambda device=None: counter[named(device)]

    def memory_of(device: Any) -> int:
        return devices.memory[devices.named("cuda" if device is None else device).index]

    def properties(device: Any = None) -> SimpleNamespace:
        size = memory_of(device)
        return SimpleNamespace(name="simulated", total_memory=size, major=9, minor=0, multi_processor_count=1)

    def reset_peak(device: Any = None) -> None:
        devices.peak[named(device)] = devices.used[named(device)]

    @contextmanager
    def use(device: Any) -> Iterator[None]:
        before = devices.current
        if device is not None and device != -1:
            devices.current = devices.named(device).index
        try:
            yield
        finally:
            devices.leave(before)

    def free_and_all(device: Any = None) -> tuple[int, int]:
        devices.contexts.add(devices.named("cuda" if device is None else device).index)
        return memory_of(device) - devices.used[named(device)], memory_of(device)

    return _ALIKE | {
        "device_count": lambda: devices.count,
        "current_device": lambda: devices.current,
        "set_device": lambda device: setattr(devices, "current", devices.named(device).index),
        "device": use,
        "get_device_properties": properties,
        "mem_get_info": free_and_all,
        "memory_allocated": bytes_on(devices.used),
        "memory_reserved": bytes_on(devices.used),
        "max_memory_allocated": bytes_on(devices.peak),
        "max_memory_reserved": bytes_on(devices.peak),
        "reset_peak_memory_stats": reset_peak,
    }


def _stream_functions(devices: SimulatedDevices) -> dict[str, Any]:
    timeline = devices.timeline

    def named(device: Any) -> torch.device:
        return devices.named("cuda" if device is None else device)

    def set_stream(stream: SimulatedStream | None) -> None:
        if stream is not None:
            timeline.choose(stream)

    @contextmanager
    def use_stream(stream: SimulatedStream | None) -> Iterator[None]:
        before = devices.current
        if stream is not None:
            devices.current = stream.device.index
        try:
            with timeline.use(stream):
                yield
        finally:
            if stream is not None:
                devices.current = before  # torch chooses the device before, which makes a context there

    return {
        "Stream": SimulatedStream,
        "Event": SimulatedEvent,
        "stream": use_stream,
        "StreamContext": use_stream,
        "set_stream": set_stream,
        "current_stream": lambda device=None: timeline.current(named(device)),
        "default_stream": lambda device=None: timeline.default(named(device)),
        "synchronize": lambda device=None: timeline.synchronize(named(device)),
    }
