"""Processes of a job, found by a variable in their environment, which also finds those that left its process group."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

MARK = "LLMPRUNE_JOB"  # environment variable with the job's id
LEASE = "lease"


def processes_by_job() -> dict[str, list[psutil.Process]]:
    """Return the living processes of all jobs, by job id."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            job = process.environ().get(MARK)
            if job is not None and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(job, []).append(process)
    return found


def processes_of_job(job: str) -> list[psutil.Process]:
    """Return every living process of a job."""
    return processes_by_job().get(job, [])


def signal_all(job: str, number: signal.Signals) -> int:
    """Send a signal to every process of a job; return their number."""
    processes = processes_of_job(job)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return len(processes)


@contextlib.contextmanager
def leased(folder: Path) -> Iterator[IO[str] | None]:
    """Take a job's lease, a file lock that processes inherit with its descriptor; None where another process has it."""
    with (folder / LEASE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            os.set_inheritable(file.fileno(), True)
            yield file  # closing releases the lock only where no process inherited it


def is_leased(folder: Path) -> bool:
    """Return whether some process holds a job's lease."""
    with leased(folder) as file:
        return file is None
