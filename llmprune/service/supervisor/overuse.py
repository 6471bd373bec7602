"""Limits on the memory and the log size of running jobs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmprune.common.schema import format_size
from llmprune.service.jobs.job import Job
from llmprune.service.memory import memory_of
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import processes_by_job


@dataclass(frozen=True)
class Overuse:
    """A job above a limit, and the sentence that says which."""

    job: Job
    message: str


def overuse(jobs: Iterable[Job], remote_launchers: Collection[str], *, settings: Settings) -> Iterator[Overuse]:
    """Find the jobs above a limit. All processes are scanned once.

    Jobs of remote launchers use the memory of another machine, and write their logs here.
    """
    jobs = tuple(jobs)
    is_limited = settings.memory_limit is not None and any(job.launcher not in remote_launchers for job in jobs)
    processes = processes_by_job() if is_limited else {}
    for job in jobs:
        used = memory_of(processes.get(job.id, ()))
        allowed = settings.memory_limit and settings.memory_limit * max(1, job.gpus)
        written = _size(settings.log(job.id))
        if allowed and used > allowed:
            message = (
                f"it used {format_size(used)} of memory and a job may use {format_size(allowed)}; take fewer or "
                "shorter calibration windows, set model.max_memory, or ask the operator for a higher --memory-limit"
            )
            yield Overuse(job, message)
        elif written > settings.log_limit:
            message = (
                f"it wrote a log of {format_size(written)} and the limit is {format_size(settings.log_limit)}; "
                "see the log for what it repeats"
            )
            yield Overuse(job, message)


def truncate_log(log: Path, limit: int) -> None:
    """Truncate a log above its limit to half the limit, so that a retry can write too."""
    if _size(log) > limit:
        with suppress(OSError):
            os.truncate(log, limit // 2)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
