"""Time left of a whole run, from estimates of its parts and the time that the finished parts took.

    left = Σ over the parts to come of estimate × pace        pace = (elapsed + w) / (estimate of the finished part + w)

The pace compares what was measured with what was estimated. w is a twentieth of the whole estimate, so that the first
seconds of a run do not decide. Parts without an estimate are left out, and the result is then a lower bound. Where an
earlier run measured a part, its time takes the place of the estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

_WEIGHT = 0.05  # w, in units of the whole estimate
_MAX_PACE = 10.0  # the pace lies between its inverse and this


def rough_duration(seconds: float) -> str:
    """Format an estimate: ``49 s``, ``12 min``, ``2 h 5 min``, ``3 days``."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if hours < 10
        else f"{hours} h"
        if hours < 100
        else f"{hours // 24} days"
    )


@dataclass(frozen=True)
class ExpectedPart:
    """Part of a run, as its plan expects it.

    ``step``: name of the step in the report; ``name``: beginning of the part's name in reports of progress.
    ``seconds``: estimate, None where there is none. ``items``: number that its progress counts to, such as layers; None
    where its progress starts over within the part. ``measured``: seconds by the measurement of an earlier run; None
    where there was none.
    """

    step: str
    name: str
    seconds: float | None
    items: int | None = None
    measured: float | None = None

    @property
    def expected(self) -> float | None:
        """Seconds that the part should take: by an earlier measurement where there is one, else by the estimate."""
        return self.seconds if self.measured is None else self.measured


@dataclass(frozen=True)
class TimeLeft:
    """Seconds left of a run.

    ``is_complete``: False where a part to come has no estimate, so that it takes longer. ``is_measured``: False as long
    as no part of this run has shown how fast it is, and no earlier run did.
    """

    seconds: float
    is_complete: bool
    is_measured: bool

    @property
    def is_known(self) -> bool:
        """True where all of the rest is estimated, and a measurement has shown how good the estimates are."""
        return self.is_complete and self.is_measured


@dataclass
class _Seen:
    """Progress of the current part: items done when it was last reported, and how many it has here.

    ``is_named``: False as long as only its step was reported: a part whose result exists never reports its name.
    """

    began: float
    is_named: bool = False
    done: int | None = None
    total: int | None = None
    left: float | None = None  # seconds of its items, at their own speed
    reported: float = 0.0


def _step_of(part: ExpectedPart) -> str:
    return part.step


@dataclass
class Forecast:
    """Time left of a run whose ``parts`` begin in this order. ``clock``: seconds, never decreasing."""

    parts: Sequence[ExpectedPart]
    clock: Callable[[], float] = time.monotonic
    _current: int = -1  # index of the part under way
    _seen: _Seen | None = None
    _elapsed: float = 0.0  # of finished parts with an estimate, in seconds
    _estimated: float = 0.0  # the same parts, as estimated
    _reused: set[str] = field(default_factory=set)
    _times: dict[str, float] = field(default_factory=dict)

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the parts that this run did from their beginning to their end, by name."""
        return dict(self._times)

    @property
    def reused(self) -> frozenset[str]:
        """Steps that need no time because their results exist."""
        return frozenset(self._reused)

    @property
    def current_step(self) -> str | None:
        """Step of the part under way; None before the first part."""
        return self._part.step if self._part else None

    def part_of(self, name: str) -> ExpectedPart | None:
        """Return the part, the current or a later one, that a reported name belongs to; None where there is none."""
        index = self._index_of(name)
        return None if index is None else self.parts[index]

    def expected_of(self, step: str) -> float | None:
        """Return the expected seconds of the step under way or the next of this name; None where a part has none."""
        parts = [part for part in self.parts[max(self._current, 0) :] if part.step == step]
        seconds = [part.expected for part in parts]
        return None if not seconds or None in seconds else sum(one for one in seconds if one is not None)

    def to_come(self) -> dict[str, float | None]:
        """Return the expected seconds of the steps after the current one; None where a part has no estimate."""
        found: dict[str, float | None] = {}
        pace = self._pace()
        for part in self.parts[self._current + 1 :]:
            if part.step not in self._reused and part.step != self.current_step:
                seconds = found.get(part.step, 0.0)
                unknown = seconds is None or part.expected is None
                found[part.step] = None if unknown else (seconds or 0.0) + (part.expected or 0.0) * pace
        return found

    def finish(self) -> None:
        """Record that the last part has ended; nothing is left."""
        self._finish(self.clock())
        self._current, self._seen = len(self.parts), None

    def note(self, name: str, done: int | None = None, *, total: int | None = None, since: float | None = None) -> None:
        """Record a report of progress. Reports of parts that are not to come are counted to the current part.

        ``since``: the clock when the first of ``total`` items began.
        """
        now = self.clock()
        index = self._index_of(name)
        if index is None:
            return
        if index != self._current:
            self._finish(now)
            self._current, self._seen = index, _Seen(now)
        seen, items = self._seen, self.parts[index].items
        if seen is not None and name.startswith(self.parts[index].name):
            seen.is_named = True
        if seen is not None and items is not None and total:
            seen.done, seen.total, seen.reported = done or 0, total, now
            seen.left = (now - since) / done * (total - done) if done and since is not None else None

    def reuse(self, step: str) -> None:
        """Record that a step needs no time because its result exists."""
        self._reused.add(step)

    def estimate(self, step: str) -> float | None:
        """Return the estimated seconds of a step; None where a part of it has no estimate, or it is not expected.

        A step that comes twice takes as long each time.
        """
        times = ([part.seconds for part in parts] for name, parts in groupby(self.parts, _step_of) if name == step)
        seconds = next(times, [None])
        return None if None in seconds else sum(one for one in seconds if one is not None)

    def left(self) -> TimeLeft | None:
        """Return the time left; None where nothing of the rest has an estimate."""
        rest = [part for part in self.parts[max(self._current, 0) :] if part.step not in self._reused]
        known = [part for part in rest if part.expected is not None]
        if not known:
            return None
        now, pace = self.clock(), self._pace()
        ahead = sum((part.expected or 0.0) * pace for part in rest if part is not self._part)
        seconds = ahead + self._left_of_current(now, pace)
        return TimeLeft(max(seconds, 0.0), is_complete=len(known) == len(rest), is_measured=self._is_measured(known))

    @property
    def _part(self) -> ExpectedPart | None:
        return self.parts[self._current] if 0 <= self._current < len(self.parts) else None

    def _is_measured(self, known: Sequence[ExpectedPart]) -> bool:
        """Return whether the pace was measured for enough of the run, or an earlier run measured most of the rest."""
        whole = sum(part.expected or 0.0 for part in known)
        earlier = sum(part.measured or 0.0 for part in known)
        return self._known_so_far()[1] >= _WEIGHT * self._whole() or 2 * earlier >= whole > 0

    def _index_of(self, name: str) -> int | None:
        """Return the index of the part, the current one or a later one, that a reported name belongs to."""
        for index in range(max(self._current, 0), len(self.parts)):
            part = self.parts[index]
            if name == part.step or name.startswith(part.name):
                return index
        return None

    def _finish(self, now: float) -> None:
        """Count the current part as finished."""
        part, seen = self._part, self._seen
        if part is None or seen is None or not seen.is_named:
            return
        share = self._share_here(part, seen)
        if share == 1.0 and part.step not in self._reused:
            self._times[part.name] = now - seen.began
        if part.expected is not None:
            self._elapsed += now - seen.began
            self._estimated += part.expected * share

    @staticmethod
    def _share_here(part: ExpectedPart, seen: _Seen) -> float:
        """Return the share of a part's items that this run has to do: a resumed part has fewer."""
        return min(seen.total / part.items, 1.0) if seen.total and part.items else 1.0

    def _whole(self) -> float:
        return sum(one.expected or 0.0 for one in self.parts)

    def _known_so_far(self) -> tuple[float, float]:
        """Return measured and estimated seconds of the finished parts and of the finished items of the current one."""
        elapsed, estimated = self._elapsed, self._estimated
        part, seen = self._part, self._seen
        if part is not None and part.expected is not None and seen is not None and seen.done and seen.total:
            elapsed += seen.reported - seen.began
            estimated += part.expected * self._share_here(part, seen) * seen.done / seen.total
        return elapsed, estimated

    def _pace(self) -> float:
        """Return measured / estimated time of what is finished; 1 at first."""
        elapsed, estimated = self._known_so_far()
        weight = _WEIGHT * self._whole()
        if not estimated + weight:
            return 1.0
        return min(max((elapsed + weight) / (estimated + weight), 1 / _MAX_PACE), _MAX_PACE)

    def _left_of_current(self, now: float, pace: float) -> float:
        """Return the seconds left of the current part; below 0 where it takes longer than expected."""
        part, seen = self._part, self._seen
        if part is None or seen is None:
            return 0.0
        if seen.left is not None:
            return seen.left - (now - seen.reported)
        if part.expected is None or part.step in self._reused:
            return 0.0
        return part.expected * self._share_here(part, seen) * pace - (now - seen.began)
