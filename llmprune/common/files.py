"""Files that are whole or not there: written beside, flushed, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmprune.common.errors import DiskError, OutputError
from llmprune.common.schema import format_size


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under another name, flush it, and rename it: it is whole or not there."""
    beside = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        try:
            write(beside)
            apply_umask(beside)
            fsync(beside)
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        fsync(path.parent)


def require_file(path: Path, *, option: str, example: str) -> None:
    """Check that a file can be written here, and make its folder. Raises OutputError.

    ``option``: the option that names it; ``example``: a file name for the remedy.
    """
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; give a file, such as {path / example}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{option} {path}: its folder cannot be made: {error}; give another place") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{option} {path}: you may not write in {path.parent}; give another place")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def replace_folder(folder: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an older one."""
    with disk_errors(final.parent):
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        folder.rename(final)
        fsync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


def apply_umask(path: Path) -> None:
    """Give a file the mode that the umask allows; libraries write some readable by the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)


def fsync(path: Path) -> None:
    """Have the operating system put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int, *, written: int = 0) -> None:
    """Raise DiskError where the disk of a folder (or of its first existing parent) is too small.

    ``written``: how many of the bytes that are needed are there already.
    """
    place = folder.absolute()
    while not os.path.exists(place):  # unlike Path.exists, False also where a name is too long or a folder closed
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed - written:
        raise DiskError(
            f"the result needs {format_size(needed - written)} on disk and {place} has {format_size(free)} free; "
            "make room, or choose another --output"
        )


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where it is not there, or cannot be looked into."""
    return sum(Path(place, name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write into a sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room (or choose another --output) and run again" if full else "choose another --output"
        raise DiskError(f"writing in {folder} failed: {error}; {remedy}") from error
