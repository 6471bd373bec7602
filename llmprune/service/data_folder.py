"""Data folder of a service: lock of the one service that uses it, and messages where it or its database is unusable."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprune.common.errors import OutputError
from llmprune.service.database.database import DatabaseError, DatabaseUnavailable
from llmprune.service.database.open_database import open_database
from llmprune.service.settings import Settings


@contextmanager
def usable(settings: Settings) -> Iterator[None]:
    """Raise OutputError where the data folder or its job table cannot be used."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the data folder {settings.data_dir} cannot be used: {error}; give another --data-dir"
        ) from error
    except DatabaseError as error:
        raise OutputError(_unusable(settings, error)) from error


def _unusable(settings: Settings, error: DatabaseError) -> str:
    """Return the sentence for a database that cannot be used."""
    reason = error.reason if isinstance(error, DatabaseUnavailable) else error
    if settings.database_url is not None:
        remedy = "start its server, or give another --database"
        return f"the {open_database(settings).place} cannot be used: {reason}; {remedy}"
    remedy = "give another --data-dir, or the file as it was last saved"
    if "readonly" in str(reason) or "unable to open" in str(reason):
        remedy = "check the permissions of the file, its -wal and -shm files and its folder, or give another --data-dir"
    return f"the job table {settings.database} cannot be used: {reason}; {remedy}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the data folder against a second service. Raises OutputError where another service uses it."""
    try:
        lock = (folder / "serve.lock").open("a")
    except OSError as error:
        raise OutputError(f"the data folder {folder} cannot be written: {error}; give another --data-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another llmprune serve uses {folder}; stop it, or give another --data-dir") from None
        yield
