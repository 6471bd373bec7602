"""Files of a run folder, or of its archive, as an upload sends them."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmprune.common.errors import OutputError, RecipeError
from llmprune.service.jobs.uploads.files import REPORT, is_run_file, run_file_of

PART_BYTES = 16 * 1024 * 1024  # of a file, in one request


@dataclass(frozen=True)
class LocalFile:
    """A file of a run folder or of its archive."""

    name: str
    size: int  # bytes
    open: Callable[[], IO[bytes]]

    def described(self) -> dict[str, Any]:
        """Return name, size and SHA-256, as an upload begins with them."""
        with self.open() as file:
            found = hashlib.sha256()
            while part := file.read(PART_BYTES):
                found.update(part)
        return {"name": self.name, "bytes": self.size, "sha256": found.hexdigest()}


def read_part(source: IO[bytes], offset: int) -> bytes:
    """Return the part of a file that begins at an offset, at most ``PART_BYTES`` long."""
    source.seek(offset)
    return source.read(PART_BYTES)


@contextmanager
def run_files(folder: Path) -> Iterator[list[LocalFile]]:
    """Open the files of a finished run folder, or of an uncompressed archive of one. Raises OutputError."""
    if not folder.is_dir() and not (folder.is_file() and tarfile.is_tarfile(folder)):
        raise OutputError(f"{folder} is no run folder and no archive of one; give what llmprune run wrote to")
    with nullcontext() if folder.is_dir() else tarfile.open(folder, "r:") as archive:
        files = _of_archive(archive) if archive else _of_folder(folder)
        if REPORT not in {file.name for file in files}:
            raise OutputError(f"{folder} has no {REPORT}; give the folder of a finished run")
        yield files


def _of_folder(folder: Path) -> list[LocalFile]:
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if is_run_file(name) and path.is_file() and not path.is_symlink():
            found.append(LocalFile(name, path.stat().st_size, lambda path=path: path.open("rb")))  # type: ignore[misc]
    return found


def _of_archive(archive: tarfile.TarFile) -> list[LocalFile]:
    found = []
    for member in archive.getmembers():
        name = run_file_of(member)
        if name is not None:
            found.append(LocalFile(name, member.size, lambda member=member: _opened(archive, member)))  # type: ignore[misc]
    return found


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    found = archive.extractfile(member)
    if found is None:
        raise RecipeError(f"{member.name} cannot be read from the archive")
    return found
