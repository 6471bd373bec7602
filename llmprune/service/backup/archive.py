"""Format of a backup: a compressed tar file with a manifest, the tables as an SQLite file, and files of jobs.

The tables are in SQLite whatever database the service uses, so that a backup of one can be restored into the other,
and read years later without a server of the right version.
"""

from __future__ import annotations

import re
import sqlite3
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmprune.common.errors import OutputError
from llmprune.service.jobs.job import JOB_ID

MANIFEST, DATABASE = "manifest.json", "database.sqlite3"
JOB_FILE = re.compile(rf"jobs/{JOB_ID}/(?:[A-Za-z0-9_][\w.-]*/){{0,2}}[A-Za-z0-9_][\w.-]*")
MAX_JOB_FILE = 10_000_000  # bytes
_MAX_MANIFEST = 100_000  # bytes


class Manifest(BaseModel):
    """Contents of a backup."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    llmprune: str  # version that made the backup
    schema_version: int
    database: str  # kind of the database that was backed up
    created: str  # UTC
    tables: dict[str, int]  # rows by table
    sha256: str  # of the SQLite file
    job_files: int = 0


def row_counts(path: Path) -> dict[str, int]:
    """Count the rows of every table. Raises OutputError where the file is damaged."""
    try:
        with closing(sqlite3.connect(path)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise OutputError(f"the job table is damaged: {found}; use an earlier backup")
            return {
                name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in names(connection)
            }
    except sqlite3.DatabaseError as error:
        raise OutputError(f"the job table is damaged: {error}; use an earlier backup") from error


def names(connection: sqlite3.Connection) -> list[str]:
    """Return the names of the tables."""
    sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY name"
    return [row[0] for row in connection.execute(sql)]


@contextmanager
def opened(path: Path) -> Iterator[tuple[tarfile.TarFile, Manifest]]:
    """Open a backup and read its manifest. Raises OutputError where it is none."""
    try:
        with tarfile.open(path) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member and member.name == MANIFEST else None
            if file is None:
                raise OutputError(f"{path} is no backup of llmprune: its first file is not {MANIFEST}; give another")
            yield archive, Manifest.model_validate_json(file.read(_MAX_MANIFEST))
    except (tarfile.TarError, EOFError, zlib.error, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise OutputError(f"{path} is no backup that this llmprune can read: {said}; give another") from error
    except OSError as error:
        raise OutputError(f"the backup {path} cannot be read: {error.strerror or error}; give another") from error
