"""Memory of this machine, or of the container around this process. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

_CGROUPS = {  # root folder and limit file of the groups, by the controllers named in /proc/self/cgroup
    "": (Path("/sys/fs/cgroup"), "memory.max"),  # version 2
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # version 1
}
# Fields of memory.stat that hold memory which cannot be dropped, by version: the page cache of files can.
_HELD = ("anon", "total_rss")


def machine_memory() -> int:
    """Return the bytes of RAM, or the limit of the container where that is less."""
    found = [psutil.virtual_memory().total]
    for path in _limit_files():
        with suppress(OSError, ValueError):  # not there, or the word max
            found.append(int(path.read_text(encoding="ascii")))
    return min(found)


def free_memory() -> int:
    """Return the bytes that programs can still take: of RAM, or below the container's limit where that is less.

    The page cache of files counts as free, because the system drops it for programs.
    """
    found = [psutil.virtual_memory().available]
    for path in _limit_files():
        with suppress(OSError, ValueError):
            limit = int(path.read_text(encoding="ascii"))
            found.append(max(limit - _held_in(path.with_name("memory.stat")), 0))
    return min(found)


def _held_in(path: Path) -> int:
    """Return the bytes of a control group that are not page cache, from its memory.stat. Raises OSError, ValueError."""
    fields = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
    return int(next((fields[name] for name in _HELD if name in fields), "0"))


def _limit_files() -> Iterator[Path]:
    """Return the files that may hold a limit of this process's control group or of a group around it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers in _CGROUPS:
            root, name = _CGROUPS[controllers]
            group = PurePosixPath(place.lstrip("/"))
            yield from (root / part / name for part in (group, *group.parents))
