"""Simulated CUDA devices: CPU tensors whose storages carry the name of a device.

    with simulated_devices(2) as devices:                  # torch.cuda.is_available() is True
        model = load_model(ModelSource(id=folder, device_map={"": "cuda:1"}))
    devices.peak["cuda:1"]                                 # most bytes of live storages

A TorchFunctionMode sees every call of torch from Python. It answers ``tensor.device``, copies on ``tensor.to``, and
raises RuntimeError, as CUDA does, where an operation gets tensors of two devices. Views share a storage, and so the
device. Values are computed on the CPU, to the bit as without the simulation.

Not simulated: kernels of a GPU, their rounding and random numbers, asynchronous copies, and what C++ does within one
call.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MEMORY = 64 << 30  # bytes that every device says it has
_CPU = torch.device("cpu")
# These take tensors of several devices: they copy, only look at one of them, or hand on a memo.
_MIX = {"copy_", "data", "grad", "__deepcopy__", "_has_compatible_shallow_copy_type", "is_same_size"}
# Kernels that refuse a tensor without dimensions on the CPU as well.
_STRICT = {"equal", "cat", "stack", "index_select", "index_copy", "index_add", "gather", "embedding", "tensordot"}
_INDEXED = {"__getitem__", "__setitem__", "index_put", "index_put_"}  # indices may be on the CPU
# These make no tensor.
_ASK = {"shape", "dtype", "ndim", "is_meta", "requires_grad", "dim", "size", "numel", "item", "tolist", "data_ptr"}
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__"}


class SimulatedDevices(TorchFunctionMode):
    """Simulated devices, and the bytes of the storages on each: ``used`` now, ``peak`` at most."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.used: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in _ASK:
            return func(*args, **kwargs)
        answer = _ANSWERS.get(name)
        if answer is not None and args and isinstance(args[0], Tensor):
            return answer(self, *args, **kwargs)
        tensors: list[Tensor] = []
        _collect(args, tensors)
        if kwargs:
            _collect(kwargs, tensors)
        home = _home_of_call(name, args, tensors, kwargs.get("out"))
        if kwargs.get("device") is not None:
            home = self.named(kwargs["device"])
            kwargs = kwargs | {"device": _CPU if home.type == "cuda" else home}
        generator = kwargs.get("generator")
        if generator is not None and {generator.device.type, home.type} == {"cpu", "cuda"}:
            raise RuntimeError(f"Expected a '{home}' device type for generator but found '{generator.device}'")
        result = func(*args, **kwargs)
        if home.type == "cuda":
            given = {tensor.untyped_storage()._cdata for tensor in tensors}
            made: list[Tensor] = []
            _collect(result, made)
            for tensor in made:
                if tensor.untyped_storage()._cdata not in given:
                    self.place(tensor, home)
        return result

    def named(self, device: Any) -> torch.device:
        """Return a device by its number or name; without an index the first of its kind."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type == "cuda" and (device.index or 0) >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device}, simulated)")
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Place a new tensor on a device, and count its bytes until its storage is freed."""
        storage = tensor.untyped_storage()
        if tensor.is_meta or device.type != "cuda" or hasattr(storage, "simulated"):
            return tensor
        storage.simulated = device
        size, name = storage.nbytes(), str(device)
        self.used[name] += size
        self.peak[name] = max(self.peak[name], self.used[name])
        weakref.finalize(storage, self.used.subtract, {name: size}).atexit = False
        return tensor

    def move(self, tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Move a tensor as ``tensor.to`` does, which takes a device, a type, both in this order, or another tensor."""
        if args and isinstance(args[0], Tensor):
            device, kwargs = home_of(args[0]), kwargs | {"dtype": args[0].dtype}
        elif args and isinstance(args[0], torch.device | str | int):
            device, *args = args
        if args and isinstance(args[0], torch.dtype):
            kwargs["dtype"] = args[0]
        kwargs["dtype"] = kwargs.get("dtype") or tensor.dtype
        home = home_of(tensor)
        target = home if device is None else self.named(device)
        if "meta" in (home.type, target.type):
            return tensor.to(target, **kwargs)
        return self.place(tensor.to(**kwargs | ({"copy": True} if target != home else {})), target)

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


class _Generator(torch.Generator):
    """Generator on a simulated device; its numbers are those of the CPU."""

    def __new__(cls, device: Any = _CPU) -> _Generator:
        made: _Generator = super().__new__(cls)
        made.home = torch.device(device)
        return made

    def __init__(self, device: Any = _CPU) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.home


def home_of(tensor: Tensor) -> torch.device:
    """Return the simulated device of a tensor."""
    if tensor.is_meta:
        return torch.device("meta")
    home: torch.device = getattr(tensor.untyped_storage(), "simulated", _CPU)
    return home


def _name(func: Any) -> str:
    if func is torch.autograd.grad:
        return "autograd.grad"
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name in ("__get__", "__set__") else name


def _collect(value: Any, found: list[Tensor]) -> None:
    """Append the tensors in a value to ``found``."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        _collect(list(value.values()), found)


def _home_of_call(name: str, args: Any, tensors: list[Tensor], out: Any) -> torch.device:
    """Return the device of an operation's result. Raises RuntimeError where its tensors are on several devices."""
    homes = list(map(home_of, tensors))
    if len(set(homes)) < 2 or name in _MIX:
        return homes[0] if homes else _CPU
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    written = tensors[:1] if in_place else []
    _collect(out, written)
    never_scalars = set(map(id, tensors if name in _STRICT else written))
    spared = _spared_indices(*args) if name in _INDEXED else set()
    strict = [
        home
        for tensor, home in zip(tensors, homes, strict=True)
        if id(tensor) not in spared and (tensor.dim() or home != _CPU or id(tensor) in never_scalars)
    ]
    if len(set(strict)) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{strict[0]} and {next(home for home in strict if home != strict[0])}! ({name}, simulated)"
        )
    return strict[0]


def _spared_indices(tensor: Tensor, index: Any, value: Any = None, *_: Any) -> set[int]:
    """Return the ids of tensors that may be elsewhere: indices on the CPU, and values without tensor indices."""
    indices: list[Tensor] = []
    _collect(index, indices)
    values = [value] if isinstance(value, Tensor) and (not indices or not value.dim()) else []
    return {id(one) for one in (*values, *(index for index in indices if home_of(index) == _CPU))}


def _refuse_on_device(devices: SimulatedDevices, tensor: Tensor, method: Callable[..., Any]) -> Any:
    if home_of(tensor).type == "cuda":
        raise TypeError(f"can't convert {home_of(tensor)} device type tensor to numpy (simulated)")
    return method()


def _pin(devices: SimulatedDevices, tensor: Tensor, *_: Any) -> Tensor:
    if home_of(tensor) != _CPU:
        raise RuntimeError("cannot pin a tensor of a device, only dense CPU tensors can be pinned (simulated)")
    pinned = tensor.clone()
    pinned.untyped_storage().pinned = True
    return pinned


def _histogram(devices: SimulatedDevices, values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Count integers too, as ``torch.histc`` does on CUDA."""
    counts = torch.histc(values.float(), *args, **kwargs).to(values.dtype)
    return devices.place(counts, home_of(values))


_ANSWERS: dict[str, Callable[..., Any]] = {
    "device": lambda _, tensor, *__: home_of(tensor),
    "is_cuda": lambda _, tensor, *__: home_of(tensor).type == "cuda",
    "is_cpu": lambda _, tensor, *__: home_of(tensor) == _CPU,
    "get_device": lambda _, tensor, *__: home_of(tensor).index if home_of(tensor).type == "cuda" else -1,
    "to": SimulatedDevices.move,
    "as_tensor": SimulatedDevices.move,
    "cpu": lambda devices, tensor, **_: devices.move(tensor, _CPU),
    "cuda": lambda devices, tensor, device=0, **_: devices.move(tensor, device),
    "autograd.grad": SimulatedDevices.gradients,
    "numpy": lambda devices, tensor, **kwargs: _refuse_on_device(devices, tensor, lambda: tensor.numpy(**kwargs)),
    "__array__": lambda devices, tensor, *args: _refuse_on_device(devices, tensor, lambda: tensor.__array__(*args)),
    "histc": _histogram,
    "pin_memory": _pin,
    "is_pinned": lambda _, tensor, *__: getattr(tensor.untyped_storage(), "pinned", False),
}


@contextmanager
def simulated_devices(count: int) -> Iterator[SimulatedDevices]:
    """Give torch ``count`` CUDA devices, in this thread and in those of thread pools."""
    devices = SimulatedDevices(count)
    submit = ThreadPoolExecutor.submit

    def submit_with_devices(
        pool: ThreadPoolExecutor, task: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Future[Any]:
        def run() -> Any:
            with devices:
                return task(*args, **kwargs)

        return submit(pool, run)

    def bytes_on(counter: Counter[str]) -> Callable[..., int]:
        return lambda device=None: counter[str(devices.named(device or 0))]

    def do_nothing(*_: Any, **__: Any) -> None:
        pass

    properties = SimpleNamespace(name="simulated", total_memory=MEMORY, major=9, minor=0, multi_processor_count=1)
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": do_nothing,
        "device": lambda _: nullcontext(),
        "get_device_name": lambda device=None: "simulated",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY - bytes_on(devices.used)(device), MEMORY),
        "memory_allocated": bytes_on(devices.used),
        "memory_reserved": bytes_on(devices.used),
        "max_memory_allocated": bytes_on(devices.peak),
        "reset_peak_memory_stats": lambda device=None: devices.peak.clear(),
        "empty_cache": do_nothing,
        "synchronize": do_nothing,
        "manual_seed_all": do_nothing,
    }
    with ExitStack() as undo:
        undo.enter_context(patch.multiple(torch.cuda, **cuda))
        undo.enter_context(patch.object(torch.accelerator, "synchronize", do_nothing))
        undo.enter_context(patch.object(torch, "Generator", _Generator))
        undo.enter_context(patch.object(ThreadPoolExecutor, "submit", submit_with_devices))
        undo.enter_context(devices)
        yield devices
