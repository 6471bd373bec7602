"""Memory of this machine: what one job may use, what a process uses, and whom the kernel ends first."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

_JOBS = 0.8  # the share of the machine that jobs may use together; the rest is for the service and the system
# Relative to all memory, in thousandths: a process with this offset is ended before any that uses less than half.
_OFFSET = 500
_CGROUPS = {  # by the controllers that /proc/self/cgroup names: where the groups lie, and the file of the limit
    "": (Path("/sys/fs/cgroup"), "memory.max"),  # version 2
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # version 1
}


def share_of_a_job(places: int) -> int:
    """Bytes that each of so many jobs may use at a time."""
    return int(_JOBS * machine_memory() / places)


def machine_memory() -> int:
    """Bytes of RAM, or what the container may use where that is less."""
    found = [psutil.virtual_memory().total]
    for path in _limit_files():
        with suppress(OSError, ValueError):  # not there, or the word max
            found.append(int(path.read_text(encoding="ascii")))
    return min(found)


def _limit_files() -> Iterator[Path]:
    """Where the limits of this process's control group and of those around it may stand."""
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


def memory_of(processes: Iterable[psutil.Process]) -> int:
    """Bytes of anonymous memory of all the processes: pages of mapped weight files can be dropped, and do not count."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):  # ended meanwhile
            info = process.memory_info()
            total += info.rss - getattr(info, "shared", 0)  # which only Linux tells
    return total


def let_kernel_end_first() -> None:
    """Where memory runs out, have the kernel end this process and its children rather than the service."""
    with suppress(OSError):  # other systems than Linux
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text(str(_OFFSET), encoding="ascii")
