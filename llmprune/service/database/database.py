"""Database of the service: SQLite in the data folder, or PostgreSQL. Numbered migrations, one writer at a time.

SQL is in the common subset of both, with ``?`` for values. A transaction that writes waits for the one before it, in
this process and in others, so its reads cannot be outdated when it writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol

from llmprune.common.errors import OutputError
from llmprune.service.database.schema import Dialect, latest, steps

BUSY_SECONDS = 30.0  # longest wait for another writer


class DatabaseError(Exception):
    """The database refused a statement, or its file is damaged."""


class IntegrityError(DatabaseError):
    """A value exists already, or names a row that does not exist."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot be used at the moment; a later attempt may succeed.

    ``reason`` is the database's own message, which may name hosts and users: for the operator only.
    """

    def __init__(self, message: str, *, reason: str, is_full: bool = False) -> None:
        super().__init__(message)
        self.reason, self.is_full = reason, is_full


class Row(Protocol):
    """A row of a result."""

    def __getitem__(self, column: str, /) -> Any:
        """Return the value of a column."""

    def keys(self) -> Any:
        """Return the names of the columns."""


class Result(Protocol):
    """Result of a statement."""

    @property
    def rowcount(self) -> int:
        """Number of rows that the statement changed."""

    def fetchone(self) -> Any:
        """Return the next row; None: there is none."""

    def fetchall(self) -> list[Any]:
        """Return the remaining rows."""


class Transaction(Protocol):
    """A transaction that writes."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Result:
        """Execute a statement."""

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]], /) -> object:
        """Execute a statement once for each row of values."""


class Database(ABC):
    """The tables of one service."""

    dialect: Dialect
    kind: Literal["SQLite", "PostgreSQL"]
    like: str  # operator that compares with a pattern, without regard to the case of ASCII letters

    @property
    @abstractmethod
    def place(self) -> str:
        """File or address, without a password."""

    @abstractmethod
    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query."""

    @abstractmethod
    def write(self) -> AbstractContextManager[Transaction]:
        """Open a transaction. It is on disk when the block ends, and rolled back where the block raises."""

    @abstractmethod
    def version(self) -> int:
        """Return the number of the last migration that was applied; 0: there are no tables."""

    @abstractmethod
    def apply(self, sql: str, version: int) -> None:
        """Execute the statements of a migration and store its number, in one transaction."""

    @abstractmethod
    def rewrite(self, tables: Sequence[str]) -> None:
        """Write tables anew, so that no earlier value is left in the database's files."""

    @contextmanager
    def only_service(self) -> Iterator[None]:
        """Keep other services from this database. Raises OutputError where another one uses it."""
        yield  # a file is in a data folder, which has a lock

    def is_current(self) -> bool:
        """Return whether the schema is up to date. Raises OutputError where a newer llmprune made it."""
        return self._checked_version() == latest()

    def migrate(self) -> None:
        """Bring the schema up to date. Raises OutputError where a newer llmprune made it."""
        for step in steps(self.dialect, above=self._checked_version()):
            self.apply(step.sql, step.number)

    def _checked_version(self) -> int:
        version, known = self.version(), latest()
        if version > known:
            raise OutputError(
                f"{self.place} is of schema {version} and this llmprune knows {known}: "
                "a newer one made it; use that, or another --data-dir"
            )
        return version
