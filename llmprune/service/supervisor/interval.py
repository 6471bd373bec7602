"""Clock of periodic work."""

from __future__ import annotations


class Interval:
    """Decides when periodic work is due: at once, then every ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = float("-inf")

    def is_due(self, now: float) -> bool:
        """Return whether the work is due, and count it as done."""
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True
