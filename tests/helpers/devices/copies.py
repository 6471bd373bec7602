"""Copies between devices and the CPU: of which kind each is, what it waits for, and when its result may be used."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helpers.devices.lines import current_line
from helpers.devices.storages import CPU, home_of, pin, state_of

if TYPE_CHECKING:
    from helpers.devices.mode import SimulatedDevices


class CopyKind(StrEnum):
    """Kind of a copy. The host waits for all but those that say they do not block, and those between devices.

    A copy does not block only where the memory of the CPU is pinned and dense and no type is converted.
    """

    TO_DEVICE = "host to device, pinned, non-blocking"
    TO_DEVICE_BLOCKING = "host to device, pinned, blocking"
    TO_DEVICE_PAGEABLE = "host to device, pageable"
    TO_HOST = "device to host, non-blocking"
    TO_HOST_BLOCKING = "device to host, blocking"
    BETWEEN = "between devices"


def move(devices: SimulatedDevices, tensor: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Move a tensor as ``tensor.to`` does, which takes a device, a type, both in this order, or another tensor."""
    rest = list(args)
    if rest and isinstance(rest[0], Tensor):
        device, kwargs = home_of(rest[0]), kwargs | {"dtype": rest[0].dtype}
        del rest[0]
    elif rest and isinstance(rest[0], torch.device | str | int) and not isinstance(rest[0], bool):
        device = rest.pop(0)
    if rest and isinstance(rest[0], torch.dtype):
        kwargs["dtype"] = rest.pop(0)
    kwargs |= dict(zip(("non_blocking", "copy"), rest, strict=False))
    kwargs |= {"dtype": kwargs.get("dtype") or tensor.dtype, "non_blocking": bool(kwargs.get("non_blocking"))}
    home = home_of(tensor)
    target = home if device is None else devices.named(device)
    if "meta" in (home.type, target.type):
        return tensor.to(target, **kwargs)
    if target == home:
        return devices.run("to", Tensor.to, (tensor,), kwargs=kwargs)
    moved = tensor.to(**kwargs | {"copy": True})
    direct = kwargs["dtype"] == tensor.dtype and _is_dense(tensor)
    if target == CPU and direct and kwargs["non_blocking"]:
        pin(moved)
    _note(devices, tensor, moved, target=target, direct=direct, non_blocking=kwargs["non_blocking"])
    return moved


def copy_in_place(devices: SimulatedDevices, tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy as ``tensor.copy_`` does."""
    home, target = home_of(source), home_of(tensor)
    if home == target or "meta" in (home.type, target.type):
        return devices.run("copy_", Tensor.copy_, (tensor, source), kwargs={})
    tensor.copy_(source)
    on_cpu = source if home == CPU else tensor
    direct = tensor.dtype == source.dtype and tensor.shape == source.shape and _is_dense(on_cpu)
    direct = direct and (home == CPU or tensor.stride() == source.stride())
    _note(devices, source, tensor, target=target, direct=direct, non_blocking=non_blocking)
    return tensor


def made_of_values(devices: SimulatedDevices, values: Any) -> None:
    """Count the copy of Python's values or indices to a device."""
    size = values.nbytes if isinstance(values, Tensor) else 0
    devices.note_copy(CopyKind.TO_DEVICE_PAGEABLE, current_line(), size)


def _note(
    devices: SimulatedDevices, source: Tensor, copied: Tensor, *, target: torch.device, direct: bool, non_blocking: bool
) -> None:  # fmt: skip
    """Count a copy and order it. ``direct``: it needs no other memory for a conversion or for gaps."""
    home, line = home_of(source), current_line()
    if home != CPU and target != CPU:
        kind = CopyKind.BETWEEN
        _order_between(devices, source, copied, target=target)
    elif target == CPU:
        kind = CopyKind.TO_HOST if direct and non_blocking and state_of(copied) else CopyKind.TO_HOST_BLOCKING
        _order_to_host(devices, source, copied, home=home, waits=kind is CopyKind.TO_HOST_BLOCKING)
    else:
        kind = CopyKind.TO_DEVICE_PAGEABLE
        if direct and state_of(source):
            kind = CopyKind.TO_DEVICE if non_blocking else CopyKind.TO_DEVICE_BLOCKING
        _order_to_device(devices, source, copied, target=target, kind=kind)
    for tensor in (source, copied):
        if (state := state_of(tensor)) is not None:
            state.line = line
    devices.note_copy(kind, line, source.nbytes)


def _order_between(devices: SimulatedDevices, source: Tensor, copied: Tensor, *, target: torch.device) -> None:
    """Order a copy after both devices' current streams, and before what comes next on either."""
    reader, writer = devices.timeline.begin(home_of(source)), devices.timeline.begin(target)
    reader.wait_stream(writer)
    _state(source).read(reader)
    writer.wait_stream(reader)
    _write(devices, copied, target=target)


def _order_to_host(
    devices: SimulatedDevices, source: Tensor, copied: Tensor, *, home: torch.device, waits: bool
) -> None:
    stream = devices.timeline.begin(home)
    _state(source).read(stream)
    state = state_of(copied)
    if state is not None:
        state.write(stream)
    if waits:
        devices.timeline.wait_for(stream.clock)


def _order_to_device(
    devices: SimulatedDevices, source: Tensor, copied: Tensor, *, target: torch.device, kind: CopyKind
) -> None:
    stream = devices.timeline.begin(target)
    state = state_of(source)
    if state is not None and kind is not CopyKind.TO_DEVICE_PAGEABLE:
        state.read(stream)
    elif state is not None:
        state.read_by_host(devices.timeline.host)
    _write(devices, copied, target=target)
    if kind is CopyKind.TO_DEVICE_BLOCKING:
        devices.timeline.host.merge(stream.clock)


def _write(devices: SimulatedDevices, copied: Tensor, *, target: torch.device) -> None:
    state = state_of(copied)
    if state is None:
        devices.place(copied, target)
    else:
        state.write(devices.timeline.current(target))


def _state(tensor: Tensor) -> Any:
    return state_of(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Check that a tensor's values lie without gaps and overlaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
