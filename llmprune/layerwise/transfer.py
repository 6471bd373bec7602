"""Copies between host memory and CUDA devices that overlap with computation, on a stream of their own.

The host never waits for a copy from or to pinned memory. Events order the copies and the computation:

- a copy begins after all work that the compute stream had when it was asked for, so it overlaps with later work;
- the compute stream waits for a tensor that arrives before it uses it (``Arriving.tensor``);
- a tensor that leaves is held until the compute stream waits for its copy, so that its memory is not reused before.

Hidden states are allocated on the compute stream and are safe to free without ``record_stream``, which would keep their
memory from being reused while the host is ahead of the device. Pageable memory (memory-mapped files) is copied through
two pinned buffers in turn; there the host waits for the copy two before.

A stream is used within ``torch.cuda.device``: on its own, ``torch.cuda.stream`` ends by choosing the thread's device
before it, which makes a context of half a gigabyte on GPU 0 in every process and thread that computes on another.

Streams: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.common.pinned_memory import pinning

Event = torch.cuda.Event  # for annotations
Stream = torch.cuda.Stream

CHUNK = 64 << 20  # bytes of a pinned buffer for layers
ARRIVING = 4  # tensors that may lie on a device before they are asked for
LEAVING = 2  # tensors on their way to the host that are held on a device at a time


@dataclass(frozen=True)
class _Copying:
    """Tensor of the stream ``compute``, which a copy reads or writes until ``copied`` occurs."""

    value: Tensor
    copied: Event
    compute: Stream

    def wait(self) -> Tensor:
        """Return the tensor; its stream waits for the copy before it uses the tensor, or its memory, again."""
        self.compute.wait_event(self.copied)
        return self.value


class Arriving:
    """Tensor on a device whose content is being copied; ``copied`` occurs when it is there."""

    def __init__(self, copying: _Copying) -> None:
        self.device, self.copied = copying.value.device, copying.copied
        self._copying = copying
        self._unused = weakref.finalize(self, copying.wait)
        self._unused.atexit = False

    def tensor(self) -> Tensor:
        """Return the tensor for use on the compute stream, which waits for the copy."""
        self._unused.detach()
        return self._copying.wait()


@dataclass
class _Buffer:
    """Pinned buffer; ``target``: pageable memory that gets its content once ``copied`` has occurred."""

    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: Event | None = None
    target: Tensor | None = None

    def settle(self) -> None:
        """Wait for the copy from or to the buffer, and write its content to the target."""
        if self.copied is not None:
            self.copied.synchronize()
        if self.target is not None:
            self.target.copy_(self.like(self.target))
        self.copied = self.target = None

    def like(self, value: Tensor) -> Tensor:
        """Return the buffer's memory in the shape and type of a tensor; it grows if that is larger."""
        size = value.numel() * value.element_size()
        if self.memory.numel() < size:
            with pinning():
                self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self.memory[:size].view(value.dtype).view(value.shape)


class Staging:
    """Two pinned buffers in host memory that are used in turn. Each is made again only for a larger tensor."""

    def __init__(self) -> None:
        self._buffers = (_Buffer(), _Buffer())
        self._turn = 0

    def take(self) -> _Buffer:
        """Return the next buffer. The host waits for the copy that used it last."""
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn]
        buffer.settle()
        return buffer

    def settle(self, target: Tensor) -> None:
        """Write content to this target that is still on its way there."""
        for buffer in self._buffers:
            if buffer.target is target:
                buffer.settle()


class CopyStream:
    """Copies of one device, in the order in which they are asked for, on a stream of their own.

    One stream serves both directions: a copy to the host waits for the computation before it anyway, and copies of
    hidden states take less time than a layer's computation on them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._incoming, self._outgoing = Staging(), Staging()
        self._arriving: weakref.WeakSet[Arriving] = weakref.WeakSet()
        self._leaving: deque[_Copying] = deque()
        weakref.finalize(self, _release, self._leaving, keep=0).atexit = False

    def bring(self, pinned: Tensor, *, after: Sequence[Event] = ()) -> Arriving:
        """Copy from pinned memory to the device, ``after`` events of other devices."""
        value = torch.empty(pinned.shape, dtype=pinned.dtype, device=self.device)
        arriving = Arriving(self._copying(value, self._copy(pinned, value, after=after)))
        self._arriving.add(arriving)
        return arriving

    @property
    def may_bring_ahead(self) -> bool:
        """Check that a tensor may be brought before it is asked for."""
        return len(self._arriving) < ARRIVING

    def send(self, value: Tensor, pinned: Tensor, *, after: Sequence[Event] = ()) -> Event:
        """Copy to pinned memory, ``after`` events of other devices; return the event of the copy's end."""
        copied = self._copy(value, pinned, after=after)
        self._leaving.append(self._copying(value, copied))
        _release(self._leaving, keep=LEAVING)
        return copied

    def bring_pageable(self, memory: Tensor) -> Arriving:
        """Copy from pageable memory to the device. The host waits for the copy from pageable memory two before."""
        buffer = self._incoming.take()
        arriving = self.bring(buffer.like(memory).copy_(memory))
        buffer.copied = arriving.copied
        return arriving

    def send_pageable(self, value: Tensor, memory: Tensor) -> None:
        """Copy to pageable memory, which ``settle`` completes. The host waits for the copy two before."""
        buffer = self._outgoing.take()
        buffer.copied = self.send(value, buffer.like(memory))
        buffer.target = memory

    def settle(self, memory: Tensor) -> None:
        """Complete a copy to this pageable memory."""
        self._outgoing.settle(memory)

    def _copy(self, source: Tensor, target: Tensor, *, after: Sequence[Event]) -> Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for event in after:
            self.stream.wait_event(event)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            copied: Event = self.stream.record_event()
        return copied

    def _copying(self, value: Tensor, copied: Event) -> _Copying:
        return _Copying(value, copied, torch.cuda.current_stream(self.device))


def _release(leaving: deque[_Copying], *, keep: int) -> None:
    """Release all but the last tensors; the compute stream waits for their copies before it reuses their memory."""
    while len(leaving) > keep:
        leaving[0].wait()
        leaving.popleft()


@dataclass(frozen=True)
class ArrivingLayer:
    """Tensors of a layer by name, on a device whose copy stream has their content when ``copied`` occurs."""

    tensors: dict[str, Tensor]
    copied: Event

    def on_compute_stream(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors for use on this thread's current stream of the device, which waits for the copies."""
        compute = torch.cuda.current_stream(device)
        compute.wait_event(self.copied)
        for tensor in self.tensors.values():
            tensor.record_stream(compute)
        return self.tensors


class LayerCopies:
    """Copies of whole layers from pageable memory to one CUDA device, which a thread of their own may make.

    Files are read into two pinned buffers in turn, ``chunk`` bytes at a time, while the other buffer is copied. Layers
    are allocated on the copy stream, because on the compute stream a copy would wait for all batches of the layer
    before it. So they need ``record_stream``; the event that ``bring`` waits for lets their memory be reused.
    """

    def __init__(self, device: torch.device, *, chunk: int = CHUNK) -> None:
        self._device, self._chunk = device, chunk
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging = Staging()

    def bring(self, tensors: dict[str, Tensor], *, after: Event | None) -> ArrivingLayer:
        """Copy the tensors of a layer. The calling thread waits for ``after``, the end of use of an earlier layer."""
        if after is not None:
            after.synchronize()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            brought = {name: self._bring(tensor) for name, tensor in tensors.items()}
            return ArrivingLayer(brought, self._stream.record_event())

    def _bring(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor.to(self._device)
        brought = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        size = max(self._chunk // tensor.element_size(), 1)
        targets, sources = torch.split(brought.view(-1), size), torch.split(tensor.contiguous().view(-1), size)
        for target, source in zip(targets, sources, strict=True):
            buffer = self._staging.take()
            target.copy_(buffer.like(source).copy_(source), non_blocking=True)
            buffer.copied = self._stream.record_event()
        return brought


class CopyStreams:
    """The copy streams of all devices, each made when it is first used."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, CopyStream] = {}

    def on(self, device: torch.device) -> CopyStream:
        """Return the copy stream of a CUDA device."""
        if device not in self._streams:
            self._streams[device] = CopyStream(device)
        return self._streams[device]

    def settle(self, memory: Tensor) -> None:
        """Complete copies to this pageable memory, from whichever device."""
        for stream in self._streams.values():
            stream.settle(memory)
