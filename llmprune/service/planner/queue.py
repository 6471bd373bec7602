"""Queue for plans: one plan of each caller at a time, and few callers at once.

A caller whose plan exceeded the time or memory of the worker is refused for a while, which doubles with each further
such plan. Other callers get their plans meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmprune.common.errors import LLMPruneError

MAX_WAITING = 8  # requests, each of which occupies a thread of the server
FIRST_PENALTY = 60.0  # seconds
MAX_PENALTY = 3600.0
FORGET_AFTER = 3600.0  # seconds without a penalty after which the next one is short again


class PlannerBusy(LLMPruneError):
    """No plan can be made now. ``wait``: seconds after which a retry makes sense."""

    def __init__(self, message: str, wait: float) -> None:
        self.wait = wait
        super().__init__(message)


class TooManyPlans(PlannerBusy):
    """The caller has another plan under way, or its last one exceeded the time or memory."""


@dataclass
class _Penalty:
    length: float
    until: float  # by the queue's clock


class PlanQueue:
    """The callers with a plan under way, and those that are refused for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._penalties: dict[str, _Penalty] = {}

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """Hold a place in the queue until a plan is made. Raises TooManyPlans and PlannerBusy without waiting."""
        with self._lock:
            self._admit(caller)
            self._waiting.add(caller)
        try:
            yield
        finally:
            with self._lock:
                self._waiting.remove(caller)

    def penalise(self, caller: str) -> None:
        """Refuse a caller for a minute, or twice as long as the last time where that was recent."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            before = self._penalties.get(caller)
            length = min(2 * before.length, MAX_PENALTY) if before else FIRST_PENALTY
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
        if len(self._waiting) >= MAX_WAITING:
            raise PlannerBusy(f"{MAX_WAITING} others wait for plans; ask again in a minute", 60.0)

    def _forget(self, now: float) -> None:
        self._penalties = {
            name: penalty for name, penalty in self._penalties.items() if now < penalty.until + FORGET_AFTER
        }
