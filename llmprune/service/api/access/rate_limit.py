"""Limits on the request rate and on the concurrent requests of a caller."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_MAX_CALLERS = 10_000  # in memory; the least recent caller is dropped first


class RateLimit:
    """A token bucket for each caller: ``burst`` requests at once, then ``rate`` per second."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, caller: str) -> float:
        """Count a request. Return 0 where it may pass, otherwise the seconds until one may."""
        now = time.monotonic()
        with self._lock:
            level, last = self._buckets.pop(caller, (float(self.burst), now))
            level = min(self.burst, level + (now - last) * self.rate)
            allowed = level >= 1
            self._buckets[caller] = (level - 1 if allowed else level, now)
            if len(self._buckets) > _MAX_CALLERS:
                self._buckets.popitem(last=False)
            return 0.0 if allowed else (1 - level) / self.rate

    def give_back(self, caller: str) -> None:
        """Uncount a request that has passed."""
        with self._lock:
            if caller in self._buckets:
                level, last = self._buckets[caller]
                self._buckets[caller] = (level + 1, last)


class ConcurrencyLimit:
    """Counts the requests that are being answered, each under any number of keys."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def counted(self, limits: Mapping[str, int]) -> Iterator[bool]:
        """Count one request under each key of ``limits`` while the block runs.

        Yields False, and counts nothing, where a key has reached its limit.
        """
        is_allowed = all(self._counts[key] < limit for key, limit in limits.items())
        if is_allowed:
            self._counts.update(limits.keys())
        try:
            yield is_allowed
        finally:
            if is_allowed:
                self._counts.subtract(limits.keys())
                self._counts = +self._counts


def network_of(address: str) -> str:
    """Return the part of an address that identifies a client: the first 64 bits of IPv6, all of IPv4."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
