"""How often one caller may ask, and how much at a time."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_MOST_CALLERS = 10_000  # remembered at a time; the longest silent is forgotten first


class RateLimit:
    """A token bucket for each caller: ``burst`` requests at once, and ``rate`` a second from then on."""

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

    def give_back(self, caller: str) -> None:
        """Do not count a request that has passed."""
        with self._lock:
            if caller in self._buckets:
                level, last = self._buckets[caller]
                self._buckets[caller] = (level + 1, last)


class InFlight:
    """How many requests are being answered, by any keys."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def counted(self, most: Mapping[str, int]) -> Iterator[bool]:
        """Count one under each key while the block runs; False, and nothing is counted, where a key has its most."""
        room = all(self._counts[key] < limit for key, limit in most.items())
        if room:
            self._counts.update(most.keys())
        try:
            yield room
        finally:
            if room:
                self._counts.subtract(most.keys())
                self._counts = +self._counts


def network_of(address: str) -> str:
    """Return what one client has of an address: of IPv6 the first half, for a client may choose the rest."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
