"""Say whom the process waits for, when an answer takes long."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PAUSES = (5.0, 25.0, 60.0)  # seconds before the first line, the second, and all others


@contextmanager
def announce_wait(whom: str, purpose: str) -> Iterator[None]:
    """Log ``whom`` the block waits for and for what, where it takes longer than 5 s; then again, ever more rarely."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_tell, args=(ended, whom), kwargs={"purpose": purpose}, name="waiting", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _tell(ended: threading.Event, whom: str, *, purpose: str) -> None:
    since = time.monotonic()
    for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
        if ended.wait(pause):
            return
        logger.warning("waiting for %s for %.0f s (%s)", whom, time.monotonic() - since, purpose)
