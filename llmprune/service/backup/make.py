"""Backup of a service's job table, and of the small files of its jobs, while the service runs."""

from __future__ import annotations

import io
import os
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from llmprune import __version__
from llmprune.common.errors import OutputError
from llmprune.common.files import sha256_of
from llmprune.service.backup.archive import DATABASE, JOB_FILE, MANIFEST, MAX_JOB_FILE, Manifest, row_counts
from llmprune.service.database.database import Database
from llmprune.service.database.open_database import is_absent
from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.settings import Settings

_KINDS = (".json", ".html", ".yaml", ".md", ".csv")  # of a run folder's files; weights and logs are left out
_COMPRESSION = 3  # of 9: most of the gain in a third of the time


def back_up(settings: Settings, database: Database, *, output: Path, with_reports: bool) -> Manifest:
    """Write a backup, readable only for this user. Raises OutputError."""
    if output.exists():
        raise OutputError(f"{output} exists; give another name for the backup")
    if is_absent(database):
        raise OutputError(f"{database.place} has no job table; give the --data-dir or --database of a service")
    try:
        with tempfile.TemporaryDirectory(prefix=".llmprune-backup-", dir=output.parent) as folder:
            tables = Path(folder) / DATABASE
            _copy(database, tables)
            files = list(_job_files(settings, tables)) if with_reports else []
            manifest = _manifest(database, tables, job_files=len(files))
            whole = Path(folder) / "whole"
            _pack(whole, manifest, tables=tables, files=files)
            with whole.open("rb") as packed:
                os.fsync(packed.fileno())
            os.link(whole, output)  # unlike a rename it never replaces a file
    except FileExistsError:
        raise OutputError(f"{output} exists; give another name for the backup") from None
    except OSError as error:
        raise OutputError(f"the backup {output} cannot be written: {error.strerror or error}") from error
    return manifest


def _copy(database: Database, path: Path) -> None:
    """Copy the tables as they are at one instant."""
    if isinstance(database, SqliteDatabase):
        with closing(sqlite3.connect(path)) as target:
            database.copy_to(target)
            target.execute("PRAGMA journal_mode = DELETE")  # one file
        return
    from llmprune.service.backup.tables import copy_to_file
    from llmprune.service.database.postgresql import PostgresqlDatabase

    assert isinstance(database, PostgresqlDatabase)
    copy_to_file(database, path)


def _manifest(database: Database, tables: Path, *, job_files: int) -> Manifest:
    return Manifest(
        llmprune=__version__,
        schema_version=SqliteDatabase(tables).version(),
        database=database.kind,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        tables=row_counts(tables),
        sha256=sha256_of(tables),
        job_files=job_files,
    )


def _job_files(settings: Settings, tables: Path) -> Iterator[tuple[str, Path]]:
    """Yield the small files of the jobs in the tables: their names in the archive, and their paths."""
    with closing(sqlite3.connect(tables)) as connection:
        jobs = [row[0] for row in connection.execute("SELECT id FROM jobs ORDER BY seq")]
    for job in jobs:
        folder = settings.folder(job)
        for path in sorted([*folder.glob("*"), *folder.glob("run/*"), *folder.glob("run/card/*")]):
            name = f"jobs/{job}/{path.relative_to(folder)}"
            is_small = path.suffix in _KINDS and path.is_file() and path.stat().st_size <= MAX_JOB_FILE
            if is_small and not path.is_symlink() and JOB_FILE.fullmatch(name):
                yield name, path


def _pack(output: Path, manifest: Manifest, *, tables: Path, files: list[tuple[str, Path]]) -> None:
    opener = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with (
        os.fdopen(opener, "wb") as file,
        tarfile.open(fileobj=file, mode="w:gz", compresslevel=_COMPRESSION) as archive,
    ):
        _add(archive, MANIFEST, content=manifest.model_dump_json(indent=1).encode() + b"\n")
        archive.add(tables, DATABASE, filter=_anonymous)
        for name, path in files:
            _add(archive, name, content=path.read_bytes())


def _add(archive: tarfile.TarFile, name: str, *, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(content), 0o600, time.time()
    archive.addfile(member, io.BytesIO(content))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member
