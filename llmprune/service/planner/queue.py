"""Who may wait for a plan: one plan of a caller at a time, and few callers at once.

A caller whose plan took all the time or memory of the process that makes plans is kept out for a while, which doubles
with each further one: others get their plans meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmprune.common.errors import LLMPruneError

MOST_WAITING = 8  # requests, each of which holds one of the server's threads
FIRST_PENALTY = 60.0  # seconds
LONGEST_PENALTY = 3600.0
FORGOTTEN_AFTER = 3600.0  # seconds after a penalty's end without another


class PlannerBusy(LLMPruneError):
    """No plan can be made now; ``wait``: seconds until it makes sense to ask again."""

    def __init__(self, message: str, wait: float) -> None:
        self.wait = wait
        super().__init__(message)


class TooManyPlans(PlannerBusy):
    """The caller's own plan is in the making, or took too much time or memory."""


@dataclass
class _Penalty:
    length: float
    until: float  # by the queue's clock


class PlanQueue:
    """The callers that wait for a plan or have one made, and those that are kept out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._penalties: dict[str, _Penalty] = {}

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """Hold a place while a plan is waited for and made. Raises TooManyPlans and PlannerBusy, both at once."""
        with self._lock:
            self._admit(caller)
            self._waiting.add(caller)
        try:
            yield
        finally:
            with self._lock:
                self._waiting.remove(caller)

    def penalise(self, caller: str) -> None:
        """Keep a caller out: a minute at first, twice as long as before where that is not long ago."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            before = self._penalties.get(caller)
            length = min(2 * before.length, LONGEST_PENALTY) if before else FIRST_PENALTY
            self._penalties[caller] = _Penalty(length, now + length)

    def _admit(self, caller: str) -> None:
        now = self._clock()
        self._forget(now)
        penalty = self._penalties.get(caller)
        if penalty and now < penalty.until:
            left = penalty.until - now
            raise TooManyPlans(
                f"a plan of yours took too much time or memory; ask again in {left:.0f} s, or run llmprune plan "
                "on a machine of your own",
                left,
            )
        if caller in self._waiting:
            raise TooManyPlans("a plan of yours is being made; ask again when it is done", 2.0)
        if len(self._waiting) >= MOST_WAITING:
            raise PlannerBusy(f"{MOST_WAITING} others wait for plans; ask again in a minute", 60.0)

    def _forget(self, now: float) -> None:
        self._penalties = {name: one for name, one in self._penalties.items() if now < one.until + FORGOTTEN_AFTER}
