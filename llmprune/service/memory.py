"""Memory of processes, and the share of one job in the memory of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from llmprune.common.machine_memory import machine_memory

_SHARE_OF_JOBS = 0.8  # fraction of the memory for all jobs together; the rest is for the service and the system
# In thousandths of all memory: the kernel kills a process with this offset before any that uses less than half.
_OOM_SCORE_OFFSET = 500


def memory_per_job(jobs: int) -> int:
    """Return the bytes that each of ``jobs`` jobs may use where all run at a time."""
    return int(_SHARE_OF_JOBS * machine_memory() / jobs)


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
