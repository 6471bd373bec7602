"""Atomic writes: a file is written under a temporary name, flushed to disk and renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmprune.common.errors import DiskError, OutputError
from llmprune.common.schema import format_size


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that it is complete or absent. ``write`` gets the temporary path. Raises DiskError."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        try:
            write(temporary)
            apply_umask(temporary)
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync(path.parent)


def require_folder(path: Path) -> None:
    """Check, without changing anything, that files can be written in a folder, or that it can be made.

    Raises OutputError.
    """
    try:
        existing = path.absolute()
        while not existing.exists() and not existing.is_symlink():
            existing = existing.parent
        if not existing.is_dir():
            what = "a file" if existing.exists() else "a link to nothing"
            raise OutputError(
                f"the output {path} is {what}; give a folder"
                if existing == path.absolute()
                else f"the output folder {path} cannot be used: {existing} is {what}; choose another --output"
            )
        if not os.access(existing, os.W_OK | os.X_OK):
            reason = f"no permission to write in {existing}"
            raise OutputError(f"the output folder {path} cannot be used: {reason}; choose another --output")
    except OSError as error:
        raise OutputError(f"the output folder {path} cannot be used: {error}; choose another --output") from error


def require_file(path: Path, *, option: str, example: str) -> None:
    """Check that a file can be written at ``path``, and create its folder. Raises OutputError.

    ``option``: the command-line option with this path; ``example``: a file name for the message.
    """
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; give a file, such as {path / example}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {path}: its folder cannot be created: {error}; give another path") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{option} {path}: no permission to write in {path.parent}; give another path")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises DiskError."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file; None where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def replace_folder(folder: Path, final: Path) -> None:
    """Rename ``folder`` to ``final``, replacing an older folder of that name. Raises DiskError."""
    with disk_errors(final.parent):
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        folder.rename(final)
        fsync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def apply_umask(path: Path) -> None:
    """Give a file the mode that the umask allows; some libraries write files that only the owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int, *, written: int = 0) -> None:
    """Raise DiskError where the disk of a folder, or of its first existing parent, is too small.

    ``needed``: bytes of the result; ``written``: bytes of it that exist already.
    """
    existing = folder.absolute()
    while not os.path.exists(existing):  # unlike Path.exists, False for names that are too long and closed folders
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed - written:
        raise DiskError(
            f"the result needs {format_size(needed - written)} on disk and {existing} has {format_size(free)} free; "
            "free some space, or choose another --output"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where it does not exist or cannot be read."""
    return sum(Path(place, name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write below ``folder`` into a DiskError with the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space (or choose another --output) and run again" if full else "choose another --output"
        raise DiskError(f"writing in {folder} failed: {error}; {remedy}") from error
