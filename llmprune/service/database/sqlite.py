"""SQLite database in WAL mode: one file, many readers, one writer at a time."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmprune.service.database.database import (
    BUSY_SECONDS,
    Database,
    DatabaseError,
    DatabaseUnavailable,
    IntegrityError,
)


class SqliteDatabase(Database):
    """One database file with a connection for each thread."""

    dialect = "sqlite"
    kind = "SQLite"
    like = "LIKE"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._writing = threading.Lock()  # a fair queue, unlike SQLite's own busy waiting

    @property
    def place(self) -> str:
        """Path of the file."""
        return str(self.path)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query."""
        with _own_errors():
            return self.connection().execute(sql, values).fetchall()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction. It is on disk when the block ends, and rolled back where the block raises."""
        with _own_errors():
            connection = self.connection()
            with self._writing:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:  # on a full disk SQLite rolls back itself
                        connection.execute("ROLLBACK")
                    raise

    def version(self) -> int:
        """Return the number of the last migration that was applied; 0: there are no tables."""
        with _own_errors():
            (version,) = self.connection().execute("PRAGMA user_version").fetchone()
        return int(version)

    def apply(self, sql: str, version: int) -> None:
        """Execute the statements of a migration and store its number, in one transaction."""
        with _own_errors():
            self.connection().executescript(f"BEGIN IMMEDIATE; {sql}; PRAGMA user_version = {version}; COMMIT;")

    def rewrite(self, tables: Sequence[str]) -> None:
        """Write the whole file anew: SQLite has one for all tables."""
        del tables
        with _own_errors(), self._writing:
            self.connection().execute("VACUUM")
            self.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def copy_to(self, target: sqlite3.Connection) -> None:
        """Copy the database, as it is at one instant, while others read and write."""
        with _own_errors():
            self.connection().backup(target)

    def close(self) -> None:
        """Close this thread's connection."""
        self.connection().close()
        del self._local.connection

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection."""
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


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the errors of SQLite as those of the interface."""
    try:
        yield
    except sqlite3.OperationalError as error:
        is_full = "full" in str(error) or "I/O" in str(error)
        raise DatabaseUnavailable(
            f"the job table cannot be written: {error}", reason=str(error), is_full=is_full
        ) from error
    except sqlite3.IntegrityError as error:
        raise IntegrityError(str(error)) from error
    except sqlite3.Error as error:
        raise DatabaseError(str(error)) from error


def _text(stored: bytes) -> str | bytes:
    """Decode a text; return its bytes where they are not UTF-8, which the reader of the column then rejects."""
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError:
        return stored
