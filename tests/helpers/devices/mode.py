"""Mode that sees every call of torch from Python, and keeps the books of the simulated devices."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from helpers.devices.copies import CopyKind, copy_in_place, made_of_values, move
from helpers.devices.lines import current_line
from helpers.devices.operations import (
    ASK,
    HOST_READS,
    collect,
    copied_indices,
    home_of_call,
    name_of,
    waits,
    written_by,
)
from helpers.devices.storages import CPU, PinnedMemory, Placed, home_of, pin, raise_reused, state_of
from helpers.devices.streams import Timeline


@dataclass(slots=True)
class _Used:
    """Tensors that an operation takes, the states of their storages, and the tensors that it writes and makes."""

    tensors: list[Tensor]
    states: list[Placed]
    written: list[Tensor]
    fresh: list[Tensor] = field(default_factory=list)

    def find_fresh(self, made: Tensor) -> None:
        """Add a result to ``fresh`` unless its storage is that of a tensor that was given."""
        storage = made.untyped_storage()
        if not hasattr(storage, "simulated") and storage._cdata not in {
            tensor.untyped_storage()._cdata for tensor in self.tensors
        }:
            self.fresh.append(made)


class SimulatedDevices(TorchFunctionMode):
    """Simulated devices, and what happened on them.

    ``memory``: bytes of each device; may be changed. ``used``, ``peak``: bytes of live storages by device, now and at
    most. ``contexts``: devices that this process uses in any way. By line of the code: ``waits`` of the host for a
    device; ``copies`` and their ``bytes_copied``, by kind too; ``float64`` operations on tensors with dimensions;
    ``pins`` of memory of the CPU. ``pinned``: the bytes of these.
    """

    def __init__(self, memory: Iterable[int], *, has_float64: bool = True) -> None:
        super().__init__()
        self.memory = list(memory)
        self.count = len(self.memory)
        self.has_float64 = has_float64
        self.used: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.contexts: set[int] = set()
        self.waits: Counter[str] = Counter()
        self.float64: Counter[str] = Counter()
        self.pins: Counter[str] = Counter()
        self.pinned = PinnedMemory()
        self.copies: Counter[tuple[CopyKind, str]] = Counter()
        self.bytes_copied: Counter[tuple[CopyKind, str]] = Counter()
        self.timeline = Timeline(lambda: self._count(self.waits, current_line()))
        self._lock = threading.Lock()
        self._thread = threading.local()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in ASK:
            return func(*args, **kwargs)
        answer = _ANSWERS.get(name)
        if answer is not None and args and isinstance(args[0], Tensor):
            return answer(self, *args, **kwargs)
        return self.run(name, func, args, kwargs=kwargs)

    def run(self, name: str, func: Any, args: Any, *, kwargs: dict[str, Any]) -> Any:
        """Run an operation, place what it makes, and order it on its device's stream."""
        tensors: list[Tensor] = []
        collect(args, tensors)
        if kwargs:
            collect(kwargs, tensors)
        states = [state_of(tensor) for tensor in tensors]
        if not kwargs and not any(states) and not any(tensor.is_meta for tensor in tensors):
            return func(*args)  # ordinary memory of the CPU
        home = home_of_call(name, args, tensors, kwargs.get("out"))
        if kwargs.get("device") is not None:
            home = self.named(kwargs["device"])
            kwargs = kwargs | {"device": CPU if home.type == "cuda" else home}
        generator = kwargs.get("generator")
        if generator is not None and {generator.device.type, home.type} == {"cpu", "cuda"}:
            raise RuntimeError(
                f"Expected a '{home}' device type for generator but found '{generator.device}' (simulated)"
            )
        if kwargs.get("pin_memory"):
            return self._make_pinned(func, args, kwargs=kwargs)
        result = func(*args, **kwargs)
        used = _Used(tensors, [state for state in states if state], written_by(name, tensors, kwargs.get("out")))
        if isinstance(result, Tensor):
            used.find_fresh(result)
        elif isinstance(result, tuple | list):
            made: list[Tensor] = []
            collect(result, made)
            for tensor in made:
                used.find_fresh(tensor)
        waited = home.type == "cuda" and waits(name, args, kwargs)
        if used.fresh or used.written or waited or name in HOST_READS:  # not a view, nor a question about the shape
            if home.type == "cuda":
                self._run_on_device(name, args, home, used=used, waited=waited)
            else:
                self._run_on_host(used)
        return result

    def _run_on_device(self, name: str, args: Any, home: torch.device, *, used: _Used, waited: bool) -> None:
        stream = self.timeline.begin(home)
        for state in used.states:
            if state.pinned:
                state.read_by_host(self.timeline.host)
            else:
                state.read(stream)
        for tensor in used.written:
            state = state_of(tensor)
            if state is not None:
                state.write(stream)
        for tensor in used.fresh:
            self.place(tensor, home)
        values = copied_indices(name, args)
        if name in _MADE_OF_VALUES:
            values.append(args[0])
        for value in values:
            made_of_values(self, value)
        if waited:
            self.timeline.wait_for(stream.clock)
        if any(tensor.dtype is torch.float64 and tensor.dim() for tensor in (*used.tensors, *used.fresh)):
            self._count(self.float64, current_line())

    def _run_on_host(self, used: _Used) -> None:
        for state in used.states:
            if state.pinned:
                state.read_by_host(self.timeline.host)
        for tensor in used.written:
            state = state_of(tensor)
            if state is not None and state.pinned:
                state.write_by_host(self.timeline.host)

    def named(self, device: Any) -> torch.device:
        """Return a device by its number or name; without an index the current one of its kind."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device}, simulated)")
        return torch.device("cuda", index)

    @property
    def current(self) -> int:
        """Index of the current device of this thread."""
        index: int = getattr(self._thread, "index", 0)
        return index

    @current.setter
    def current(self, index: int) -> None:
        self._thread.index = index
        self.contexts.add(index)

    def leave(self, before: int) -> None:
        """Make the device before the thread's current one again, without a context on it."""
        self._thread.index = before

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Place a new tensor on a device, and count its bytes until its storage is freed.

        Raises torch.OutOfMemoryError where they exceed the device's memory.
        """
        storage = tensor.untyped_storage()
        if tensor.is_meta or device.type != "cuda" or hasattr(storage, "simulated"):
            return tensor
        if tensor.dtype is torch.float64 and not self.has_float64:
            raise TypeError("Cannot convert a tensor to float64: the device doesn't support float64. (simulated)")
        stream = self.timeline.current(device)
        raise_reused(stream)
        size, name = storage.nbytes(), str(device)
        self._take(size, device)
        storage.simulated = Placed(device, stream, stream.moment)
        weakref.finalize(storage, self._free, storage.simulated, {name: size}).atexit = False
        return tensor

    def _take(self, size: int, device: torch.device) -> None:
        name, memory = str(device), self.memory[device.index]
        self.contexts.add(device.index)
        with self._lock:
            if self.used[name] + size > memory:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {_mib(size)}. GPU {device.index} has a total capacity of "
                    f"{_mib(memory)} of which {_mib(max(memory - self.used[name], 0))} is free. (simulated)"
                )
            self.used[name] += size
            self.peak[name] = max(self.peak[name], self.used[name])

    def _free(self, state: Placed, sizes: dict[str, int]) -> None:
        self.used.subtract(sizes)
        state.note_freed(self.timeline.host)

    def _make_pinned(self, func: Any, args: Any, *, kwargs: dict[str, Any]) -> Tensor:
        return self._pin(func(*args, **kwargs | {"pin_memory": False}))

    def pin_memory(self, tensor: Tensor, *_: Any) -> Tensor:
        """Return a copy in pinned memory, or the tensor if it is pinned."""
        if home_of(tensor) != CPU:
            raise RuntimeError("cannot pin a tensor of a device, only dense CPU tensors can be pinned (simulated)")
        state = state_of(tensor)
        if state is not None:
            return tensor
        return self._pin(tensor.clone())

    def _pin(self, tensor: Tensor) -> Tensor:
        self._count(self.pins, current_line())
        self.pinned.take(tensor.untyped_storage())
        return pin(tensor)

    def note_copy(self, kind: CopyKind, line: str, size: int) -> None:
        """Count a copy of a kind by the line that asked for it."""
        self._count(self.copies, (kind, line))
        self._count(self.bytes_copied, (kind, line), size)

    def _count(self, counter: Counter[Any], key: Any, count: int = 1) -> None:
        with self._lock:
            counter[key] += count

    def gradients(self, outputs: Tensor, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Compute gradients as ``torch.autograd.grad`` does: each on the device of its tensor."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(home_of(value) != home_of(outputs) for value in given):
            raise RuntimeError(
                f"expected a gradient on {home_of(outputs)} but got one on {home_of(given[0])} (simulated)"
            )
        found: tuple[Tensor, ...] = torch.autograd.grad(outputs, inputs, *args, **kwargs)
        wanted = [inputs] if isinstance(inputs, Tensor) else inputs
        return tuple(self.place(gradient, home_of(one)) for gradient, one in zip(found, wanted, strict=True))

    def histogram(self, values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Count integers too, as ``torch.histc`` does on CUDA."""
        if home_of(values) == CPU:
            return torch.histc(values, *args, **kwargs)
        counted = self.run("histc", lambda given: torch.histc(given.float(), *args, **kwargs), (values,), kwargs={})
        return self.run("to", Tensor.to, (counted, values.dtype), kwargs={})


def _refuse_on_device(devices: SimulatedDevices, tensor: Tensor, name: str, *args: Any, **kwargs: Any) -> Any:
    if home_of(tensor).type == "cuda":
        raise TypeError(f"can't convert {home_of(tensor)} device type tensor to numpy (simulated)")
    return devices.run(name, getattr(Tensor, name), (tensor, *args), kwargs=kwargs)


_MADE_OF_VALUES = {"tensor", "as_tensor", "asarray", "new_tensor"}


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


_ANSWERS: dict[str, Callable[..., Any]] = {
    "device": lambda _, tensor, *__: home_of(tensor),
    "is_cuda": lambda _, tensor, *__: home_of(tensor).type == "cuda",
    "is_cpu": lambda _, tensor, *__: home_of(tensor) == CPU,
    "get_device": lambda _, tensor, *__: home_of(tensor).index if home_of(tensor).type == "cuda" else -1,
    "to": move,
    "as_tensor": move,
    "copy_": copy_in_place,
    "cpu": lambda devices, tensor, **_: move(devices, tensor, CPU),
    "cuda": lambda devices, tensor, device="cuda", **kwargs: move(devices, tensor, device, **kwargs),
    "autograd.grad": SimulatedDevices.gradients,
    "numpy": lambda devices, tensor, **kwargs: _refuse_on_device(devices, tensor, "numpy", **kwargs),
    "__array__": lambda devices, tensor, *args: _refuse_on_device(devices, tensor, "__array__", *args),
    "histc": SimulatedDevices.histogram,
    "pin_memory": SimulatedDevices.pin_memory,
    "is_pinned": lambda _, tensor, *__: home_of(tensor) == CPU and state_of(tensor) is not None,
}
