"""Places of all waiting jobs, computed at most every few seconds however many people look at them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from llmprune.service.jobs.job import ACTIVE, JOB_COLUMNS, JobSummary, job_of
from llmprune.service.jobs.run_times import known_run_times
from llmprune.service.jobs.store import JobStore
from llmprune.service.monitoring.queue_estimate import QueuePlace, QueueState, places_of
from llmprune.service.settings import Settings
from llmprune.service.supervisor.devices import Machine
from llmprune.service.supervisor.launchers import remote_launchers

_VALID_FOR = 3.0  # seconds
_MOST_JOBS = 300  # waiting jobs whose start is estimated
_ORDER = "FROM jobs WHERE state = 'queued' ORDER BY priority DESC, seq"


class QueueBoard:
    """Places of the waiting jobs of a service. ``paused``: returns why no job starts, if so."""

    def __init__(self, settings: Settings, jobs: JobStore, *, paused: Callable[[], str | None]) -> None:
        self.settings, self.jobs, self.paused = settings, jobs, paused
        self._lock = threading.Lock()
        self._places: dict[str, QueuePlace] = {}
        self._made = float("-inf")

    def place(self, job: JobSummary) -> QueuePlace | None:
        """Return the place of a job; None where it does not wait. While another caller computes, the last one."""
        if job.state != "queued":
            return None
        known = self._places.get(job.id)
        if known is not None and time.monotonic() - self._made < _VALID_FOR:
            return known
        if self._lock.acquire(blocking=known is None):
            try:
                if time.monotonic() - self._made >= _VALID_FOR or job.id not in self._places:
                    self._places, self._made = places_of(self._state()), time.monotonic()
            finally:
                self._lock.release()
        return self._places.get(job.id)

    def _state(self) -> QueueState:
        read = self.jobs.database.read
        running = self.jobs.in_states(*ACTIVE)
        waiting = [job_of(row) for row in read(f"SELECT {JOB_COLUMNS} {_ORDER} LIMIT ?", (_MOST_JOBS,))]
        seconds = {job: times.last for job, times in known_run_times(self.jobs.database, [*running, *waiting]).items()}
        for job in running:
            if job.run_seconds_left is not None:
                seconds[job.id] = job.run_seconds_left
            elif job.id in seconds and job.attempts == 1:
                seconds[job.id] = max(seconds[job.id] - job.ran_seconds, 0.0)
            else:
                seconds.pop(job.id, None)
        return QueueState(
            machine=Machine(self.settings.gpus, self.settings.slots),
            running=running,
            waiting=waiting,
            order=[row["id"] for row in read(f"SELECT id {_ORDER}")],
            seconds=seconds,
            remote=remote_launchers(self.settings),
            paused=self.paused(),
        )
