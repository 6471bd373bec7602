"""Waits for layers to be read from the disk, and when they are worth a warning."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

logger = logging.getLogger(__name__)

REMEDY = "put the model on a faster disk, or free memory so that its files stay cached"
_LARGE_WAIT = 0.3  # share of a step's time
_LONG_WAIT = 10.0  # seconds; less is not worth a warning


def is_long(waited: float, seconds: float) -> bool:
    """Check that a step waited for the disk long enough for a warning. ``waited``: of its ``seconds``."""
    return waited >= _LONG_WAIT and waited > _LARGE_WAIT * seconds


@dataclass
class _Watched:
    """A watched step: its name, its begin, and the seconds waited before it."""

    name: str
    began: float
    before: float


class DiskWaits:
    """Time in ``seconds`` that the host has waited for layers, and a warning while a step waits for long."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._watched: _Watched | None = None

    @contextmanager
    def watch(self, name: str) -> Iterator[None]:
        """Log a warning as soon as the step in the block has waited for long, once."""
        self._watched = _Watched(name, time.perf_counter(), self.seconds)
        try:
            yield
        finally:
            self._watched = None

    def add(self, seconds: float) -> None:
        """Add a wait that has just ended."""
        self.seconds += seconds
        if self._watched is None:
            return
        name, waited = self._watched.name, self.seconds - self._watched.before
        passed = time.perf_counter() - self._watched.began
        if is_long(waited, passed):
            self._watched = None
            logger.warning(
                "%s has waited %.0f of its %.0f s for layers to be read: the disk is slower than the computation; %s",
                *(name, waited, passed, REMEDY),
            )
