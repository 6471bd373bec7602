"""PostgreSQL database. An advisory lock makes its transactions wait for each other, as those of SQLite do."""

from __future__ import annotations

import re
import select
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

from llmprune.common.errors import RecipeError
from llmprune.service.database.database import (
    BUSY_SECONDS,
    Database,
    DatabaseError,
    DatabaseUnavailable,
    IntegrityError,
    Result,
    Transaction,
)
from llmprune.service.database.service_lock import held

try:
    import psycopg
    from psycopg import errors as states
    from psycopg.adapt import Dumper
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg.rows import dict_row
    from psycopg.types.string import StrDumperUnknown
except ImportError as error:
    raise RecipeError("--database needs a package that is not installed: pip install 'llmprune[postgresql]'") from error

Connection = psycopg.Connection[dict[str, Any]]

MAX_CONNECTIONS = 16  # of one process
_LOCKS = 0x6C6C6D70  # "llmp": first number of this program's advisory locks
_WRITER, _SERVICE = 1, 2
# A dead server or network shows within half a minute, not after the hours that TCP waits by default.
_DEFAULTS = {"connect_timeout": "10", "keepalives_idle": "15", "keepalives_interval": "5", "tcp_user_timeout": "30000"}
_SESSION = (
    f"SET lock_timeout = '{BUSY_SECONDS:.0f}s'; SET idle_in_transaction_session_timeout = '60s'; "
    "SET client_min_messages = 'error'; SET plan_cache_mode = force_custom_plan"  # a pattern decides the plan
)
_PASSING = (
    psycopg.OperationalError, psycopg.InterfaceError,
    states.InvalidTransactionState, states.IdleInTransactionSessionTimeout, states.ReadOnlySqlTransaction,
)  # fmt: skip


class PostgresqlDatabase(Database):
    """A PostgreSQL database with a few connections, which are opened again after they were lost."""

    dialect = "postgresql"
    kind = "PostgreSQL"
    like = "ILIKE"

    def __init__(self, url: str) -> None:
        self._conninfo = make_conninfo(**cast(dict[str, Any], _DEFAULTS | conninfo_to_dict(url)))
        self._idle: deque[Connection] = deque()
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._writing = threading.Lock()  # waiting writers hold one connection of this process, not all

    @property
    def place(self) -> str:
        """Host and name of the database."""
        known = conninfo_to_dict(self._conninfo)
        return f"PostgreSQL database {known.get('dbname', '?')} at {known.get('host', 'the default host')}"

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the rows of a query."""
        with _own_errors(), self._connected() as connection:
            return connection.execute(_translated(sql), values).fetchall()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Open a transaction. It is on disk when the block ends, and rolled back where the block raises."""
        with _own_errors(), self._writing, self._connected() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (_LOCKS, _WRITER))
            yield PostgresqlTransaction(connection)

    @contextmanager
    def using(self) -> Iterator[Connection]:
        """Open a connection for work that takes long. The errors in the block are those of the interface."""
        with _own_errors(), self.connect() as connection:
            yield connection

    def version(self) -> int:
        """Return the number of the last migration that was applied; 0: there are no tables."""
        with _own_errors(), self._connected() as connection:
            return self.version_in(connection)

    def version_in(self, connection: Connection) -> int:
        """Return the version as a connection sees it."""
        if connection.execute("SELECT to_regclass('schema_version') AS found").fetchall()[0]["found"] is None:
            return 0
        rows = connection.execute("SELECT max(version) AS version FROM schema_version").fetchall()
        return int(rows[0]["version"] or 0)

    def apply(self, sql: str, version: int) -> None:
        """Execute the statements of a migration and store its number, in one transaction."""
        with _own_errors(), self._writing, self._connected() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (_LOCKS, _WRITER))
            connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
            connection.execute(sql.encode())
            connection.execute("DELETE FROM schema_version")
            connection.execute("INSERT INTO schema_version VALUES (%s)", (version,))

    def rewrite(self, tables: Sequence[str]) -> None:
        """Write tables anew."""
        with self.using() as connection:
            for table in tables:
                connection.execute(f"VACUUM FULL {table}".encode())

    @contextmanager
    def only_service(self) -> Iterator[None]:
        """Keep other services from this database. Raises OutputError where another one uses it."""
        with held(self.connect, (_LOCKS, _SERVICE), place=self.place):
            yield

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def connect(self) -> Connection:
        """Open a connection outside the pool. Raises DatabaseUnavailable."""
        with _own_errors():
            connection = psycopg.connect(self._conninfo, autocommit=True, row_factory=dict_row)
            connection.execute(_SESSION)
            connection.adapters.register_dumper(bool, _BoolAsInteger)
            connection.adapters.register_dumper(str, _TextWithoutNul)
            return connection

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Borrow a connection; one that fails is closed."""
        if not self._free.acquire(timeout=BUSY_SECONDS):
            raise psycopg.OperationalError(f"all {MAX_CONNECTIONS} connections are in use")
        try:
            connection = self._idle_connection() or self.connect()
            try:
                yield connection
            finally:
                if connection.closed or connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    connection.close()
                else:
                    self._idle.append(connection)
        finally:
            self._free.release()

    def _idle_connection(self) -> Connection | None:
        """Return an open connection that the server has not ended; None: there is none."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took it
                return None
            if not connection.closed and not _says_something(connection):
                return connection
            connection.close()
        return None


def _says_something(connection: Connection) -> bool:
    """Return whether the server has sent something unasked, as it does when it ends a connection."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


class PostgresqlTransaction:
    """A transaction, in the SQL of both databases."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Result:
        """Execute a statement."""
        return self._connection.execute(_translated(sql), values)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]], /) -> None:
        """Execute a statement once for each row of values."""
        with self._connection.cursor() as cursor:
            cursor.executemany(_translated(sql), rows)


class _BoolAsInteger(Dumper):
    """Writes a bool as 0 or 1, as SQLite does."""

    oid = psycopg.postgres.types["int8"].oid

    def dump(self, obj: Any) -> bytes:
        return b"1" if obj else b"0"


class _TextWithoutNul(StrDumperUnknown):
    """Writes a text without NUL characters, which PostgreSQL does not store."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", "\ufffd"))


@lru_cache(maxsize=512)
def _translated(sql: str) -> Any:
    """Return a statement with psycopg's placeholders: ``%s`` for ``?`` outside of quotes, ``%%`` for ``%``."""
    parts = re.split(r"('[^']*')", sql)
    return "".join(
        part.replace("%", "%%") if part.startswith("'") else part.replace("%", "%%").replace("?", "%s")
        for part in parts
    )


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the errors of psycopg as those of the interface."""
    try:
        yield
    except psycopg.IntegrityError as error:
        raise IntegrityError(str(error)) from error
    except psycopg.Error as error:
        if not _is_passing(error):
            raise DatabaseError(str(error)) from error
        is_full = isinstance(error, states.DiskFull)
        message = "the database has no space left" if is_full else "the database cannot be reached at the moment"
        raise DatabaseUnavailable(message, reason=" ".join(str(error).split()), is_full=is_full) from error


def _is_passing(error: psycopg.Error) -> bool:
    """Return whether the cause of an error may pass. Without a state it is the client's: the connection broke."""
    is_of_the_client = error.sqlstate is None and not isinstance(error, psycopg.ProgrammingError | psycopg.DataError)
    return isinstance(error, _PASSING) or is_of_the_client


def without_password(url: str, *, source: str) -> tuple[str, str | None]:
    """Return an address without its password, and the password. Raises RecipeError where it is no valid address."""
    try:
        known = conninfo_to_dict(url)
    except psycopg.ProgrammingError as error:
        raise RecipeError(f"{source}: {' '.join(str(error).split())}; give postgresql://USER@HOST/NAME") from None
    password = known.pop("password", None)
    return make_conninfo(**cast(dict[str, Any], known)), None if password is None else str(password)
