"""How often one caller may ask: a token bucket for each, by the monotonic clock."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

_MOST_CALLERS = 10_000  # remembered at a time; the longest silent is forgotten first


class RateLimit:
    """``burst`` requests at once, and ``rate`` a second from then on."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, caller: str) -> float:
        """0 where the request may pass, else in how many seconds it may."""
        now = time.monotonic()
        with self._lock:
            level, last = self._buckets.pop(caller, (float(self.burst), now))
            level = min(self.burst, level + (now - last) * self.rate)
            allowed = level >= 1
            self._buckets[caller] = (level - 1 if allowed else level, now)
            if len(self._buckets) > _MOST_CALLERS:
                self._buckets.popitem(last=False)
            return 0.0 if allowed else (1 - level) / self.rate
