"""Memory of this machine and of processes, and the share of one job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

_SHARE_OF_JOBS = 0.8  # fraction of the memory for all jobs together; the rest is for the service and the system
# In thousandths of all memory: the kernel kills a process with this offset before any that uses less than half.
_OOM_SCORE_OFFSET = 500
_CGROUPS = {  # root folder and limit file of the groups, by the controllers named in /proc/self/cgroup
    "": (Path("/sys/fs/cgroup"), "memory.max"),  # version 2
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),  # version 1
}


def memory_per_job(jobs: int) -> int:
    """Return the bytes that each of ``jobs`` jobs may use where all run at a time."""
    return int(_SHARE_OF_JOBS * machine_memory() / jobs)


def machine_memory() -> int:
    """Return the bytes of RAM, or the limit of the container where that is less."""
    found = [psutil.virtual_memory().total]
    for path in _limit_files():
        with suppress(OSError, ValueError):  # not there, or the word max
            found.append(int(path.read_text(encoding="ascii")))
    return min(found)


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


def memory_of(processes: Iterable[psutil.Process]) -> int:
    """Return the bytes of anonymous memory of processes: without mapped weight files, whose pages can be dropped."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):  # ended meanwhile
            info = process.memory_info()
            total += info.rss - getattr(info, "shared", 0)  # only on Linux
    return total


def let_kernel_end_first() -> None:
    """Have the kernel kill this process and its children before the service where memory runs out."""
    with suppress(OSError):  # other systems than Linux
        Path(f"/proc/{os.getpid()}/oom_score_adj").write_text(str(_OOM_SCORE_OFFSET), encoding="ascii")
