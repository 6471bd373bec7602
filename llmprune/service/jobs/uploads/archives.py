"""Uploads of a run folder as one tar archive, which is unpacked while it arrives. They cannot be continued.

A complete one becomes a job as an upload file by file does, after the same checks. Until then nothing of it can be
read; one that is refused or breaks off leaves nothing.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.uploads.files import MAX_FILES, UploadFile, check_files, record_problem, run_file_of
from llmprune.service.jobs.uploads.uploads import UploadRequest, Uploads
from llmprune.service.users.tokens import Caller

_BLOCK = 64 * 1024  # bytes that are read at once
_HEADERS = 512 * 1024  # bytes that may lie between the contents of two files
_MARK = 2 * tarfile.BLOCKSIZE  # zeros at the end of an archive
_TOUCH_EVERY = 2**30  # bytes


class Source(Protocol):
    """An archive that arrives."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` further bytes, none at the end."""


def receive_archive(source: Source, uploads: Uploads, *, request: UploadRequest, size: int, caller: Caller) -> Job:
    """Unpack an archive of at most ``size`` bytes into a new job. ``request``: all but its files.

    A run that was uploaded before with the same labels stays as it is. Raises RecipeError, Conflict and QueueFull.
    """
    upload = uploads.begin_archive(request, caller, size=size)
    try:
        files = _unpack(_Reader(source, lambda: uploads.touch(upload.id)), upload.folder)
        check_files(files)
        return uploads.finish_archive(upload, files)
    except BaseException:
        uploads.discard(upload.id)
        raise


class _Reader(io.BufferedIOBase):
    """A source as tarfile reads it. Long headers, which tarfile would keep in memory, are refused."""

    def __init__(self, source: Source, touch: Callable[[], None]) -> None:
        super().__init__()
        self.total = 0  # bytes read
        self.end = 0  # position behind the last byte that is not zero
        self.allowed = _HEADERS  # bytes until the next file must have begun
        self._source, self._touch, self._touched = source, touch, 0

    def read(self, size: int | None = _BLOCK, /) -> bytes:
        part = self._source.read(size or _BLOCK)
        if filled := len(part.rstrip(b"\0")):
            self.end = self.total + filled
        self.total += len(part)
        self.allowed -= len(part)
        if self.allowed < 0:
            raise RecipeError(f"the archive has a header of more than {_HEADERS:,} bytes", "upload")
        if self.total - self._touched > _TOUCH_EVERY:
            self._touched = self.total
            self._touch()
        return part


def _unpack(reader: _Reader, folder: Path) -> tuple[UploadFile, ...]:
    """Write the files of a run that an archive has, and return them. Raises RecipeError."""
    files: list[UploadFile] = []
    number = 0
    try:
        with tarfile.open(fileobj=reader, mode="r|", bufsize=_BLOCK) as archive:
            while (member := archive.next()) is not None:
                reader.allowed = _HEADERS + member.size
                number += 1
                if number > 2 * MAX_FILES or len(files) >= MAX_FILES:
                    raise RecipeError(
                        f"the archive has too many files; a run folder has at most {MAX_FILES:,}", "upload"
                    )
                name = run_file_of(member)
                content = None if name is None else archive.extractfile(member)
                if name is not None and content is not None:
                    files.append(_write(content, name, folder=folder, size=member.size))
            end = archive.offset
            while reader.read(_BLOCK):
                reader.allowed = _HEADERS
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise _no_archive(files) from error
    if reader.end > end or reader.total < end + _MARK:
        raise _no_archive(files)
    return tuple(files)


def _no_archive(files: list[UploadFile]) -> RecipeError:
    """Return the refusal of an archive that cannot be read, or not to its end."""
    if not files:
        return RecipeError(
            "it is no uncompressed tar archive of a run; choose the archive that a job's page offers for download, or "
            "make one with tar -cf run.tar -C RUN_FOLDER .",
            "upload",
        )
    return RecipeError(
        f"the archive is damaged or cut off behind {files[-1].name}; make it again, or get it again", "upload"
    )


def _write(content: IO[bytes], name: str, *, folder: Path, size: int) -> UploadFile:
    """Write a file of the archive, and return its hash. Raises RecipeError."""
    if problem := record_problem(name, size):
        raise RecipeError(problem, "upload")
    path, digest = folder / name, hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        raise RecipeError(f"the archive has {name!r} twice, or as a file and a folder", "upload") from error
    with file:
        while part := content.read(_BLOCK):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return UploadFile(name=name, bytes=size, sha256=digest.hexdigest())
