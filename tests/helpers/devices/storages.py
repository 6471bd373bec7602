"""Storages with a device or in pinned memory: who wrote them last, who reads them, and what the host may do."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helpers.devices.lines import current_line
from helpers.devices.streams import Clock, Moment, SimulatedStream

CPU = torch.device("cpu")


@dataclass(slots=True)
class Placed:
    """State of a storage.

    ``owner``: the stream that it was allocated on, None for pinned memory. ``written``: the last operation that wrote
    it, unless the host did. ``reads``: last tick of each stream that reads it. ``recorded``: numbers of the streams
    that ``record_stream`` named. ``line``: code that issued the last copy to or from it.
    """

    device: torch.device
    owner: SimulatedStream | None = None
    written: Moment | None = None
    reads: dict[int, int] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    line: str = ""

    @property
    def pinned(self) -> bool:
        """Memory of the CPU that is pinned."""
        return self.device == CPU

    def read(self, stream: SimulatedStream) -> None:
        """Let an operation of a stream read. Raises RuntimeError where the last write is not ordered before it."""
        self._require_written(stream.clock, "a stream reads")
        self.reads[stream.number] = stream.clock[stream.number]

    def write(self, stream: SimulatedStream) -> None:
        """Let an operation of a stream write. Raises RuntimeError where the last uses are not ordered before it."""
        self._require_unused(stream.clock, "a stream overwrites")
        self.written, self.line = stream.moment, ""
        self.reads.clear()

    def read_by_host(self, host: Clock) -> None:
        """Let the host read. Raises RuntimeError where the last write may not be done."""
        self._require_written(host, "the host reads")

    def write_by_host(self, host: Clock) -> None:
        """Let the host write. Raises RuntimeError where a stream may still write or read."""
        self._require_unused(host, "the host overwrites")
        self.written = None
        self.reads.clear()

    def note_freed(self, host: Clock) -> None:
        """Leave the uses by other streams that are not over to the stream whose memory it was."""
        if self.owner is None:
            return
        uses = [*self.reads.items(), *([self.written] if self.written else [])]
        self.owner.freed += [
            (use, self.line)
            for use in uses
            if use[0] != self.owner.number
            and use[0] not in self.recorded
            and not self.owner.clock.knows(use)
            and not host.knows(use)
        ]

    def _require_written(self, clock: Clock, use: str) -> None:
        if self.written is not None and not clock.knows(self.written):
            raise self._unordered(use, f"before stream {self.written[0]} has written it")

    def _require_unused(self, clock: Clock, use: str) -> None:
        self._require_written(clock, use)
        for moment in self.reads.items():
            if not clock.knows(moment):
                raise self._unordered(use, f"while stream {moment[0]} still reads it")

    def _unordered(self, use: str, when: str) -> RuntimeError:
        copied = f"; it was copied at {self.line}" if self.line else ""
        where = "pinned memory" if self.pinned else str(self.device)
        return RuntimeError(f"{current_line()}: {use} a tensor in {where} {when}{copied} (simulated)")


@dataclass
class PinnedMemory:
    """Bytes of pinned memory: ``used`` by live storages, and ``kept`` of freed ones for later ones.

    ``limit``: of those used; None for no limit.
    """

    limit: int | None = None
    used: int = 0
    kept: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def take(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed. Raises RuntimeError, in the words of CUDA, where it is too large."""
        size = storage.nbytes()
        if self.limit is not None and self.used + size > self.limit:
            raise RuntimeError("CUDA error: out of memory (simulated)")
        with self._lock:
            self.used += size
        weakref.finalize(storage, self._free, size).atexit = False

    def empty_cache(self) -> None:
        """Return the memory that is kept to the system."""
        self.kept = 0

    def _free(self, size: int) -> None:
        with self._lock:
            self.used -= size
            self.kept += size


def state_of(tensor: Tensor) -> Placed | None:
    """Return the state of a tensor's storage; None for ordinary memory of the CPU, and for the meta device."""
    state: Placed | None = getattr(tensor.untyped_storage(), "simulated", None)
    return state


def home_of(tensor: Tensor) -> torch.device:
    """Return the simulated device of a tensor."""
    if tensor.is_meta:
        return torch.device("meta")
    state = state_of(tensor)
    return CPU if state is None else state.device


def pin(tensor: Tensor) -> Tensor:
    """Mark a new tensor's storage as pinned."""
    tensor.untyped_storage().simulated = Placed(CPU)
    return tensor


def raise_reused(stream: SimulatedStream) -> None:
    """Raise RuntimeError where memory that a stream allocates may be that of a freed tensor still in use elsewhere."""
    freed, stream.freed = stream.freed, []
    for moment, line in freed:
        if not stream.clock.knows(moment):
            copied = f" (copied at {line})" if line else ""
            raise RuntimeError(
                f"{current_line()}: stream {stream.number} allocates memory of a tensor{copied} that was freed while "
                f"stream {moment[0]} may still use it; record_stream is missing (simulated)"
            )
