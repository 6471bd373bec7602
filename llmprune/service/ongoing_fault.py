"""Log lines of a fault that lasts, such as a job table that cannot be written."""

from __future__ import annotations

import logging

_OVER_AFTER = 30.0  # seconds without the fault: a check that fails only when it writes passes in between
_AGAIN_AFTER = 3600.0  # seconds


class OngoingFault:
    """Logs a fault of repeated work when it begins or its reason changes, hourly while it lasts, and at its end.

    ``what`` names the fault, such as "the job table cannot be used". Times are in seconds of ``time.monotonic``.
    """

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger, self._what = logger, what
        self._reason: str | None = None  # None: there is no fault
        self._began = self._last = self._said = 0.0

    def occurred(self, reason: str, now: float) -> None:
        """Log that the work failed, unless that was said."""
        if self._reason is None:
            self._began = now
        if reason != self._reason:
            self._logger.warning("%s (%s); trying again", self._what, reason)
            self._said = now
        elif now - self._said >= _AGAIN_AFTER:
            self._logger.warning("%s for %.1f hours (%s)", self._what, (now - self._began) / 3600, reason)
            self._said = now
        self._reason, self._last = reason, now

    def passed(self, now: float) -> None:
        """Log that the fault is over, where the work has not failed for some time."""
        if self._reason is not None and now - self._last >= _OVER_AFTER:
            self._logger.info("no longer: %s (%s)", self._what, self._reason)
            self._reason = None
