"""Running jobs that take more than they may: memory of this machine, or room for their logs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from llmprune.common.schema import format_size
from llmprune.service.jobs.job import Job
from llmprune.service.memory import memory_of
from llmprune.service.settings import Settings
from llmprune.service.supervisor.processes import by_job


def overuse(jobs: Iterable[Job], elsewhere: Collection[str], *, settings: Settings) -> Iterator[tuple[Job, str]]:
    """The jobs that take too much, each with a sentence. Memory is looked at in one scan of all processes.

    Jobs of the launchers ``elsewhere`` use another machine's memory, and write their logs here.
    """
    jobs = tuple(jobs)
    here = settings.memory_limit is not None and any(job.launcher not in elsewhere for job in jobs)
    processes = by_job() if here else {}
    for job in jobs:
        used = memory_of(processes.get(job.id, ()))
        most = settings.memory_limit and settings.memory_limit * max(1, job.gpus)
        written = _size(settings.log(job.id))
        if most and used > most:
            yield (
                job,
                (
                    f"it used {format_size(used)} of memory and a job may use {format_size(most)}; take fewer or "
                    "shorter calibration windows, set model.max_memory, or ask the operator for a higher --memory-limit"
                ),
            )
        elif written > settings.log_limit:
            yield (
                job,
                (
                    f"it wrote a log of {format_size(written)} and the limit is {format_size(settings.log_limit)}; "
                    "the log says what it repeats"
                ),
            )


def shorten(log: Path, most: int) -> None:
    """Cut a log that is too long to its first half, so that a retry can write too."""
    if _size(log) > most:
        with suppress(OSError):
            os.truncate(log, most // 2)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
