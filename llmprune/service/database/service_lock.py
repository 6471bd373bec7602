"""Lock of the one service on a PostgreSQL database. A connection of its own holds it, and takes it again when lost."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmprune.common.errors import OutputError
from llmprune.service.database.database import DatabaseError

logger = logging.getLogger(__name__)

_CHECK_EVERY = 5.0  # seconds
_RELEASED_WITHIN = 10.0  # seconds after which the server has noticed that the previous holder was killed


@contextmanager
def held(connect: Callable[[], Any], numbers: tuple[int, int], *, place: str) -> Iterator[None]:
    """Hold an advisory lock while the block runs. Raises OutputError where another service holds it.

    Where the connection is lost and another service takes the lock before this one, this process gets SIGTERM.
    """
    connection = connect()
    if not _takes(connection, numbers, seconds=_RELEASED_WITHIN):
        connection.close()
        raise OutputError(f"another llmprune serve uses the {place}; stop it, or give another --database")
    holder = _Holder(connect, numbers, connection=connection)
    thread = threading.Thread(target=holder.watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        holder.over.set()
        thread.join()
        holder.connection.close()


class _Holder:
    """Connection that holds the lock."""

    def __init__(self, connect: Callable[[], Any], numbers: tuple[int, int], *, connection: Any) -> None:
        self._connect, self._numbers, self.connection = connect, numbers, connection
        self.over = threading.Event()

    def watch(self) -> None:
        """Take the lock again whenever its connection is lost."""
        import psycopg

        while not self.over.wait(_CHECK_EVERY):
            try:
                self.connection.execute("SELECT 1")
            except psycopg.Error:
                self._take_again()

    def _take_again(self) -> None:
        import psycopg

        self.connection.close()
        try:
            self.connection = self._connect()
            taken = _takes(self.connection, self._numbers, seconds=_RELEASED_WITHIN)
        except (DatabaseError, psycopg.Error):
            return  # the server is away: the next check tries again
        if not taken:
            logger.error("another llmprune serve uses the database since the connection was lost; this one stops")
            os.kill(os.getpid(), signal.SIGTERM)


def _takes(connection: Any, numbers: tuple[int, int], *, seconds: float) -> bool:
    """Take the lock; return False where another session holds it for that long."""
    deadline = time.monotonic() + seconds
    while not connection.execute("SELECT pg_try_advisory_lock(%s, %s) AS taken", numbers).fetchone()["taken"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
