"""Simulated streams and events: which work is ordered before which, by vector clocks.

Every stream counts its operations in ticks. A stream, an event and the host each know, by stream, the last tick that is
ordered before whatever comes next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

Moment = tuple[int, int]  # number of a stream, and a tick of it


class Clock(dict[int, int]):
    """The last tick that is known of each stream, by the stream's number."""

    def knows(self, moment: Moment) -> bool:
        """Check that a moment is ordered before what comes next here."""
        return self.get(moment[0], 0) >= moment[1]

    def merge(self, other: Clock) -> None:
        """Order everything that ``other`` knows before what comes next here."""
        for number, tick in tuple(other.items()):  # other threads add to it
            if tick > self.get(number, 0):
                self[number] = tick


class Timeline:
    """Streams of all devices, the current one of each thread and device, and what the host knows of them.

    ``note_wait`` is called whenever the host waits.
    """

    def __init__(self, note_wait: Callable[[], None]) -> None:
        self.host = Clock()
        self.streams: list[SimulatedStream] = []
        self._note_wait = note_wait
        self._defaults: dict[torch.device, SimulatedStream] = {}
        self._thread = threading.local()

    def default(self, device: torch.device) -> SimulatedStream:
        """Return a device's default stream."""
        if device not in self._defaults:
            self._defaults[device] = SimulatedStream(device, timeline=self)
        return self._defaults[device]

    def current(self, device: torch.device) -> SimulatedStream:
        """Return this thread's current stream of a device."""
        chosen: dict[torch.device, SimulatedStream] = getattr(self._thread, "chosen", {})
        return chosen.get(device) or self.default(device)

    def choose(self, stream: SimulatedStream) -> None:
        """Make a stream the current one of its device in this thread."""
        self._thread.chosen = getattr(self._thread, "chosen", {}) | {stream.device: stream}

    @contextmanager
    def use(self, stream: SimulatedStream | None) -> Iterator[None]:
        """Make a stream the current one while the context lasts."""
        before = getattr(self._thread, "chosen", {})
        if stream is not None:
            self.choose(stream)
        try:
            yield
        finally:
            self._thread.chosen = before

    def begin(self, device: torch.device) -> SimulatedStream:
        """Begin an operation on a device's current stream, after all that the host knows; return the stream."""
        stream = self.current(device)
        stream.begin()
        return stream

    def wait_for(self, clock: Clock) -> None:
        """Let the host wait, and count it."""
        self._note_wait()
        self.host.merge(clock)

    def synchronize(self, device: torch.device) -> None:
        """Let the host wait for all streams of a device."""
        everything = Clock()
        for stream in self.streams:
            if stream.device == device:
                everything.merge(stream.clock)
        self.wait_for(everything)


class SimulatedStream:
    """Stream of a device; as ``torch.cuda.Stream``. ``clock`` knows the stream's own ticks and those ordered before it.

    ``freed``: last uses on other streams of storages that were allocated on this one and freed before these uses were
    ordered before it: (moment, line).
    """

    timelines: ClassVar[list[Timeline]] = []

    def __init__(self, device: Any = None, priority: int = 0, *, timeline: Timeline | None = None) -> None:
        self.timeline = timeline or self.timelines[-1]
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else _indexed(device)
        self.timeline.streams.append(self)
        self.number = self.stream_id = len(self.timeline.streams)
        self.clock = Clock()
        self.freed: list[tuple[Moment, str]] = []

    @property
    def moment(self) -> Moment:
        """The stream's last tick."""
        return self.number, self.clock.get(self.number, 0)

    def begin(self) -> None:
        """Begin an operation after all that the host knows."""
        self.clock.merge(self.timeline.host)
        self.clock[self.number] = self.clock.get(self.number, 0) + 1

    def wait_stream(self, other: SimulatedStream) -> None:
        """Order what is on the other stream so far before what comes next here."""
        self.clock.merge(other.clock)

    def wait_event(self, event: SimulatedEvent) -> None:
        """Order what the event recorded before what comes next here."""
        self.clock.merge(event.clock)

    def record_event(self, event: SimulatedEvent | None = None) -> SimulatedEvent:
        """Record what is on the stream so far."""
        event = event or SimulatedEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait for the stream."""
        self.timeline.wait_for(self.clock)

    def query(self) -> bool:
        """Say that all work is done, which the host then knows."""
        self.timeline.host.merge(self.clock)
        return True

    def __enter__(self) -> SimulatedStream:
        self._context = self.timeline.use(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class SimulatedEvent:
    """Event of a stream; as ``torch.cuda.Event``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock = Clock()

    def record(self, stream: SimulatedStream | None = None) -> None:
        """Record what is on the stream, by default the current one, so far."""
        stream = stream or torch.cuda.current_stream()
        self.clock = Clock(stream.clock)

    def wait(self, stream: SimulatedStream | None = None) -> None:
        """Order what was recorded before what comes next on a stream, by default the current one."""
        stream = stream or torch.cuda.current_stream()
        stream.wait_event(self)

    def synchronize(self) -> None:
        """Let the host wait for what was recorded."""
        SimulatedStream.timelines[-1].wait_for(self.clock)

    def query(self) -> bool:
        """Say that what was recorded is done, which the host then knows."""
        SimulatedStream.timelines[-1].host.merge(self.clock)
        return True

    def elapsed_time(self, end: SimulatedEvent) -> float:
        """Return one millisecond."""
        return 1.0


def _indexed(device: Any) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
