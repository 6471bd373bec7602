"""Consistent copies of a run folder by hard links, made in milliseconds while the run goes on.

The run names its valid files in ``run.json`` and ``progress.json`` files, replaces every file by renaming, and deletes
older files only after newer ones are named. A copy is consistent if these names did not change while it was linked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmprune.results.run_folder.products import HIDDEN_STATES, JOURNAL, LOCK

_NAMING = (JOURNAL, "progress.json")
_LEFT_OUT = (HIDDEN_STATES,)  # a cache, which another attempt makes again
_TRIES = 5

Stamp = tuple[int, int, int]  # inode, nanoseconds of the last change, bytes


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files of a run folder, without caches, locks and files that are being written."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and name != LOCK and path.is_file() and not path.is_symlink():
                yield path


def stamp(path: Path) -> Stamp | None:
    """Return what changes with every change of a file; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def naming_files(folder: Path) -> dict[Path, Stamp | None]:
    """Return the files that name the valid files of a run, with their stamps."""
    return {path: stamp(path) for path in files_in(folder) if path.name in _NAMING}


def link_snapshot(folder: Path, copy: Path) -> bool:
    """Link the files of a run folder into ``copy``; return False where the run changed meanwhile, so that it is none.

    Raises OSError where the file system has no hard links or cannot be written.
    """
    for _ in range(_TRIES):
        shutil.rmtree(copy, ignore_errors=True)
        before = naming_files(folder)
        _link(sorted(files_in(folder), key=lambda path: path not in before), folder, copy=copy)
        if naming_files(folder) == before:
            return True
    return False


def _link(paths: list[Path], folder: Path, *, copy: Path) -> None:
    for path in paths:
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except FileNotFoundError:  # replaced or deleted meanwhile
            continue
