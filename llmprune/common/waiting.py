"""Log messages while the process waits for a slow answer."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PAUSES = (5.0, 25.0, 60.0)  # seconds before the first message, the second, and each later one


@contextmanager
def announce_wait(whom: str, purpose: str) -> Iterator[None]:
    """Log ``whom`` the block waits for and its ``purpose``, first after 5 s and then less and less often."""
    ended = threading.Event()
    thread = threading.Thread(target=_log, args=(ended, whom), kwargs={"purpose": purpose}, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _log(ended: threading.Event, whom: str, *, purpose: str) -> None:
    since = time.monotonic()
    for pause in itertools.chain(PAUSES, itertools.repeat(PAUSES[-1])):
        if ended.wait(pause):
            return
        logger.warning("waiting for %s for %.0f s (%s)", whom, time.monotonic() - since, purpose)
