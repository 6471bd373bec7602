"""Restore of a backup into an empty job table, on SQLite or PostgreSQL, and migration to the current schema."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path

from llmprune.common.errors import OutputError
from llmprune.common.files import sha256_of
from llmprune.service.backup.archive import (
    DATABASE,
    JOB_FILE,
    MAX_JOB_FILE,
    Manifest,
    opened,
    row_counts,
)
from llmprune.service.database.database import Database
from llmprune.service.database.schema import latest
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.settings import Settings

_OF_THE_MOMENT = ("heartbeat", "sessions")  # tables that are not restored: people sign in again


def restore(settings: Settings, database: Database, *, backup: Path) -> Manifest:
    """Restore a backup; nothing is changed where it cannot be. The caller holds the lock of the service.

    Files of jobs that are there already are kept. Raises OutputError where the job table is not empty, the backup is
    damaged, or a newer llmprune made it.
    """
    _require_empty(settings, database)
    with (
        opened(backup) as (archive, manifest),
        tempfile.TemporaryDirectory(prefix=".restore-", dir=settings.data_dir) as folder,
    ):
        if manifest.schema_version > latest():
            raise OutputError(
                f"{backup} has schema {manifest.schema_version} of llmprune {manifest.llmprune}, and this llmprune "
                f"knows {latest()}; restore it with that version or a newer one"
            )
        tables = Path(folder) / DATABASE
        _extract_tables(archive, tables, manifest=manifest, backup=backup)
        _bring_up_to_date(tables)
        _extract_files(archive, settings)
        _put(tables, settings, database=database)
    return manifest


def _require_empty(settings: Settings, database: Database) -> None:
    if isinstance(database, SqliteDatabase):
        found = sorted(settings.data_dir.glob(f"{settings.database.name}*"))  # a left -wal would be replayed
        if found:
            raise OutputError(f"{found[0]} exists; move the job table away first, or give another --data-dir")
        return
    from llmprune.service.backup.tables import has_rows
    from llmprune.service.database.postgresql import PostgresqlDatabase

    assert isinstance(database, PostgresqlDatabase)
    if has_rows(database):
        raise OutputError(f"the {database.place} is not empty; give an empty one")


def _extract_tables(archive: tarfile.TarFile, path: Path, *, manifest: Manifest, backup: Path) -> None:
    """Extract the SQLite file and compare it with the manifest."""
    member = archive.next()
    file = archive.extractfile(member) if member and member.name == DATABASE else None
    if file is None:
        raise OutputError(f"{backup} is no backup of llmprune: its second file is not {DATABASE}; give another")
    with path.open("wb") as copy:
        shutil.copyfileobj(file, copy)
    if sha256_of(path) != manifest.sha256 or row_counts(path) != manifest.tables:
        raise OutputError(f"{backup} is damaged: its tables are not those of its manifest; use another backup")


def _bring_up_to_date(tables: Path) -> None:
    database = SqliteDatabase(tables)
    database.migrate()
    with database.write() as connection:
        for table in _OF_THE_MOMENT:
            connection.execute(f"DELETE FROM {table}")
    database.close()
    with closing(sqlite3.connect(tables)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")  # one file again


def _extract_files(archive: tarfile.TarFile, settings: Settings) -> None:
    """Extract the files of jobs that are not there yet. A name that no backup has is not extracted."""
    for member in archive:
        file = archive.extractfile(member) if member.isreg() else None
        if file is None or not JOB_FILE.fullmatch(member.name) or member.size > MAX_JOB_FILE:
            continue
        place = settings.data_dir / member.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            beside = place.with_name(f"{place.name}.partial")
            beside.write_bytes(file.read())
            os.replace(beside, place)


def _put(tables: Path, settings: Settings, *, database: Database) -> None:
    if isinstance(database, SqliteDatabase):
        with tables.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(tables, settings.database)
        return
    from llmprune.service.backup.tables import copy_from_file
    from llmprune.service.database.postgresql import PostgresqlDatabase

    assert isinstance(database, PostgresqlDatabase)
    database.migrate()
    copy_from_file(tables, database)
