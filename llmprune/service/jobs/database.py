"""SQLite database in WAL mode: one file, many readers, one writer at a time, numbered migrations."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmprune.common.errors import OutputError

BUSY_SECONDS = 30.0


class Database:
    """One database file with a connection for each thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._writing = threading.Lock()  # a fair queue, unlike SQLite's own busy waiting

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        return self._connection().execute(sql, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction. It is on disk when the block ends, and rolled back where the block raises."""
        connection = self._connection()
        with self._writing:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # on a full disk SQLite rolls back itself
                    connection.execute("ROLLBACK")
                raise

    def is_current(self) -> bool:
        """Return whether the schema is up to date. Raises OutputError where a newer llmprune made it."""
        return not self._missing_steps()

    def migrate(self) -> None:
        """Bring the schema up to date. Raises OutputError where a newer llmprune made it."""
        for step in self._missing_steps():
            self._connection().executescript(
                f"BEGIN IMMEDIATE; {step.read_text(encoding='utf-8')}; PRAGMA user_version = {_number(step)}; COMMIT;"
            )

    def _missing_steps(self) -> list[Any]:
        steps = sorted(
            (file for file in files(__package__).joinpath("migrations").iterdir() if _number(file)), key=_number
        )
        (version,) = self._connection().execute("PRAGMA user_version").fetchone()
        if version > len(steps):
            raise OutputError(
                f"{self.path} is of schema {version} and this llmprune knows {len(steps)}: "
                "a newer one made it; use that, or another --data-dir"
            )
        return steps[version:]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.text_factory = _text  # by default one damaged text fails the whole query
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # an accepted job survives a power cut
            connection.execute("PRAGMA foreign_keys = ON")
            self._local.connection = connection
        return connection


def _text(stored: bytes) -> str | bytes:
    """Decode a text; return its bytes where they are not UTF-8, which the reader of the column then rejects."""
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError:
        return stored


def _number(step: Any) -> int:
    """Return the number of a migration: 2 for ``0002_tokens.sql``; 0 for a file that is no migration."""
    head = step.name.split("_")[0]
    return int(head) if step.name.endswith(".sql") and head.isdigit() else 0
