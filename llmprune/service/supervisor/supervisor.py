"""The supervisor: starts waiting jobs, follows running ones, and ends those that are cancelled or above a limit.

It keeps nothing in memory that the job table and the launchers do not have, so that it may die at any moment.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from llmprune.common.errors import LLMPruneError
from llmprune.service.database.open_database import open_database
from llmprune.service.jobs.hub_token import drop_token
from llmprune.service.jobs.job import ACTIVE, Job, Outcome
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings
from llmprune.service.supervisor.attempts import launch_of, prepare
from llmprune.service.supervisor.cleanup import clean_up, measure_jobs, remove_deleted
from llmprune.service.supervisor.devices import Machine, Start
from llmprune.service.supervisor.fetched_files import FetchedFiles
from llmprune.service.supervisor.interval import Interval
from llmprune.service.supervisor.isolation import Isolation
from llmprune.service.supervisor.launchers import make_launchers
from llmprune.service.supervisor.launchers.base import Launcher, NotNow
from llmprune.service.supervisor.outcomes import GATE_NOT_MET, RECIPE_WRONG, EndedAttempt, outcome_of
from llmprune.service.supervisor.overuse import overuse, truncate_log
from llmprune.service.supervisor.progress import read_progress
from llmprune.service.supervisor.remote_jobs import RemoteJobs
from llmprune.service.supervisor.score_sharing import ScoreSharing
from llmprune.service.users.quotas import room_for

logger = logging.getLogger(__name__)

WRITE_EVERY = 3.0  # seconds between writes of heartbeat and run time: each write waits for the disk
CLEAN_UP_EVERY = 60.0
MEASURE_EVERY = 1.0  # seconds between scans of the memory of all processes
MAX_RESTARTS = 25  # attempts at a job that repeatedly ends together with the service
_WAITING_PROGRESS = {"step": "waiting for the cluster"}


class Supervisor:
    """Runs rounds over the job table. At a time only one works on a data folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.jobs = JobStore(open_database(settings))
        self.launchers = make_launchers(settings)
        self.machine = Machine(settings.gpus, settings.slots)
        self._isolation = Isolation()
        self._remote = {name for name, launcher in self.launchers.items() if not launcher.on_this_machine}
        self._score_sharing = ScoreSharing(settings, self.jobs)
        self._remote_jobs = RemoteJobs(settings, self.jobs, launchers=self.launchers)
        self._fetched = FetchedFiles(settings, self.jobs)
        self._seen: set[tuple[str, int]] = set()  # attempts that this supervisor started or saw alive
        self._stopped_at: dict[str, float] = {}  # time.monotonic() of the SIGTERM, by job
        self._ran: dict[str, float] = {}  # seconds that are not in the table yet, by job
        self._overuse: dict[str, str] = {}  # the limit because of which a job was ended, by job
        self._over_quota, self._last_round = False, time.monotonic()
        self._heartbeat, self._clean, self._measure = map(Interval, (WRITE_EVERY, CLEAN_UP_EVERY, MEASURE_EVERY))

    def round(self) -> None:
        """Follow every running job, then start the waiting jobs that can start."""
        now = time.monotonic()
        elapsed, self._last_round = now - self._last_round, now
        if self._heartbeat.is_due(now):
            self._write_heartbeat(now)
        for job in self.jobs.in_states(*ACTIVE):
            self._isolated(job, partial(self._follow, job, elapsed))
        if self._measure.is_due(now):
            self._isolation.attempt("measuring memory and logs", self._end_overuse)
        if self._clean.is_due(now):
            self._isolation.attempt("looking at other machines", self._remote_jobs.look_at_machines)
            self._isolation.attempt("removing artefacts", partial(remove_deleted, self.settings, self.jobs.database))
            self._isolation.attempt("the clean-up", self._clean_up)
        self._isolation.attempt("removing fetched files", self._fetched.remove_unused)
        if not self._over_quota:
            self._isolation.attempt("starting jobs", self._start_waiting)

    def stop(self) -> None:
        """End the jobs of this machine and queue them again: the next service continues them."""
        running = [job for job in self.jobs.in_states("running") if job.launcher not in self._remote]
        while running:
            running = [job for job in running if self._isolated(job, partial(self._end_processes, job))]
            time.sleep(0.1)
            ended: list[str] = []
            running = [job for job in running if self._isolated(job, partial(self._queue_ended, job, ended))]
            running = [job for job in running if job.id not in ended]

    def _isolated(self, job: Job, work: Callable[[], object]) -> bool:
        """Do a piece of work for one job. Return whether the job can continue; otherwise it fails with the reason."""
        damaged = set(job.unreadable) - {"figures", "published"}  # these are only displayed
        if damaged:
            self._abandon(job, f"its row in the job table is damaged ({', '.join(sorted(damaged))}); submit it again")
            return False
        error = self._isolation.attempt(f"job {job.id}", work)
        if error is not None:
            reason = str(error) if isinstance(error, LLMPruneError) else f"{type(error).__name__}: {error}"
            self._abandon(job, f"the service cannot continue it: {reason}; retry, or tell the operator")
        return error is None

    def _abandon(self, job: Job, reason: str) -> None:
        """Kill the processes of a job where that is possible, and fail it."""
        if job.launcher in self.launchers:
            self._isolation.attempt(f"ending job {job.id}", partial(self._kill, job))
        self._isolation.attempt(f"failing job {job.id}", partial(self._give_up, job, reason))

    def _kill(self, job: Job) -> None:
        self.launchers[job.launcher].stop(launch_of(job, self.settings), force=True)

    def _give_up(self, job: Job, reason: str) -> None:
        self._drop_token(job)
        self.jobs.give_up(job.id, reason)

    def _queue_ended(self, job: Job, ended: list[str]) -> None:
        """Queue a job again once its processes have ended, and add it to ``ended``."""
        attempt = self.launchers[job.launcher].poll(launch_of(job, self.settings))
        if attempt.state == "running":
            return
        ended.append(job.id)
        if attempt.code in (0, RECIPE_WRONG, GATE_NOT_MET):  # it finished before SIGTERM took effect
            self._end(job, attempt.code)
        else:
            self.jobs.progress(job.id, round(job.ran_seconds + self._ran.pop(job.id, 0.0), 2), news={})
            self.jobs.queue_again(job.id)

    def _write_heartbeat(self, now: float) -> None:
        with self.jobs.database.write() as connection:
            connection.execute(
                'INSERT INTO heartbeat (id, monotonic, "full") VALUES (1, ?, ?) '
                'ON CONFLICT (id) DO UPDATE SET monotonic = excluded.monotonic, "full" = excluded."full"',
                (now, self._over_quota),
            )

    def _follow(self, job: Job, elapsed: float) -> None:
        """Poll a running job and act on its state. ``elapsed``: seconds since the last round."""
        if job.launcher not in self.launchers:
            return self._fail(job, None, error=_not_offered(job))
        launch = launch_of(job, self.settings)
        attempt = self.launchers[job.launcher].poll(launch)
        if attempt.state == "unknown":
            return None
        if attempt.state == "ended":
            return self._end(job, attempt.code, elapsed=elapsed)
        if attempt.state == "returned" and job.state == "running":
            return self._queue_returned(job)
        if attempt.state == "lost":
            return self._handle_lost(job, attempt.machine)
        if attempt.state in ("gone", "returned"):
            return self._handle_gone(job)
        self._seen.add((job.id, job.attempts))
        is_waiting = attempt.state == "waiting"
        progress = _WAITING_PROGRESS if is_waiting else read_progress(launch.folder, job.fraction)
        ran = self._write_progress(job, progress, elapsed=0.0 if is_waiting else elapsed)
        if job.state == "cancelling" or ran - job.ran_before > self._time_limit(job):
            self._end_processes(job)
        return None

    def _time_limit(self, job: Job) -> float:
        """Return the seconds that a job may run. A job that was queued without a limit has the service's."""
        return job.time_limit or self.settings.time_limit or float("inf")

    def _write_progress(self, job: Job, progress: dict[str, Any], *, elapsed: float) -> float:
        """Write progress that has changed; return the seconds that the job has run."""
        self._ran[job.id] = self._ran.get(job.id, 0.0) + elapsed
        ran = job.ran_seconds + self._ran[job.id]
        news = progress if any(getattr(job, name) != value for name, value in progress.items()) else {}
        if news or self._ran[job.id] >= WRITE_EVERY:
            self.jobs.progress(job.id, round(ran, 2), news=news)
            del self._ran[job.id]
        return ran

    def _end_processes(self, job: Job) -> None:
        """Send SIGTERM once, and SIGKILL after the grace."""
        launcher, launch = self.launchers[job.launcher], launch_of(job, self.settings)
        since = self._stopped_at.get(job.id)
        if since is None:
            self._stopped_at[job.id] = time.monotonic()
            launcher.stop(launch, force=False)
        elif time.monotonic() - since > self.settings.grace:
            launcher.stop(launch, force=True)

    def _end_overuse(self) -> None:
        """Kill the jobs above a limit; a later poll finds them ended."""
        for found in overuse(self.jobs.in_states(*ACTIVE), self._remote, settings=self.settings):
            if found.job.launcher in self.launchers:
                logger.warning("job %s is ended: %s", found.job.id, found.message)
                self._overuse.setdefault(found.job.id, found.message)
                self._isolated(found.job, partial(self._kill, found.job))

    def _clean_up(self) -> None:
        self._over_quota = clean_up(self.settings, self.jobs)
        measure_jobs(self.settings, self.jobs)

    def _queue_returned(self, job: Job) -> None:
        """Queue a job again for which a cluster had no capacity for a long time."""
        if job.attempts < MAX_RESTARTS:
            return self.jobs.queue_again(job.id)
        error = f"the cluster had no capacity in {job.attempts} attempts; ask for fewer GPUs than {job.gpus}, or retry"
        return self._fail(job, None, error=error)

    def _handle_gone(self, job: Job) -> None:
        """End or continue a job without process and exit code: it was killed, or ended together with the service."""
        if job.launcher in self._remote and (job.id, job.attempts) in self._seen:
            return self._handle_lost(job, "forgotten by the cluster")
        if job.state == "cancelling" or (job.id, job.attempts) in self._seen or job.attempts >= MAX_RESTARTS:
            return self._end(job, None)
        logger.info("job %s ended together with the service: it continues", job.id)
        return self.jobs.queue_again(job.id)

    def _handle_lost(self, job: Job, machine: str) -> None:
        """Queue a job again whose machine is lost, unless it is cancelled or loses its machine again and again."""
        if job.state == "cancelling":
            return self._end(job, None)
        error = self._remote_jobs.lost(job, machine, ran_seconds=job.ran_seconds + self._ran.pop(job.id, 0.0))
        return self._fail(job, None, error=error) if error is not None else None

    def _end(self, job: Job, code: int | None, *, elapsed: float = 0.0) -> None:
        """Clean up after an attempt and write its outcome.

        ``elapsed``: seconds since the last round, which may be all that the attempt ran.
        """
        self._stopped_at.pop(job.id, None)
        ran = job.ran_seconds + self._ran.pop(job.id, 0.0)
        if (job.id, job.attempts) in self._seen:
            ran += elapsed
        launch = launch_of(job, self.settings)
        if job.launcher not in self._remote:
            self._kill(job)  # processes that the run may have left
        truncate_log(launch.log, self.settings.log_limit)
        drop_token(launch.folder, launch.log)
        ended = EndedAttempt(
            job=job,
            code=code,
            ran_seconds=ran,
            time_limit=self._time_limit(job),
            overuse=self._overuse.pop(job.id, None),
            log=launch.log,
            run_folder=self.settings.run_folder(job.id),
        )
        self.jobs.end(job.id, outcome_of(ended), ran_seconds=ran)

    def _start_waiting(self) -> None:
        waiting = self.jobs.in_states("queued")
        if not waiting:
            return
        capacity = dict.fromkeys(self._remote, 0)
        for name in self._remote & {job.launcher for job in waiting}:
            self._isolation.attempt(f"asking {name} for its capacity", partial(self._ask_capacity, name, capacity))
        waiting = [job for job in waiting if not job.unreadable or self._isolated(job, lambda: None)]
        waiting, sources = self._score_sharing.choose([job for job in waiting if self._remote_jobs.can_start(job)])
        running = self.jobs.in_states(*ACTIVE)
        room = room_for(self.jobs.database, self.settings, waiting=waiting, running=running)
        for start in self.machine.startable(waiting, running, remote_capacity=capacity, room=room):
            self._isolated(start.job, partial(self._start, start, scores_of=sources.get(start.job.id)))

    def _ask_capacity(self, name: str, capacity: dict[str, int]) -> None:
        capacity[name] = self.launchers[name].capacity()

    def _start(self, start: Start, *, scores_of: str | None) -> None:
        started = self.jobs.start(start.job.id, start.devices, scores_of=scores_of)
        if started is None:
            return
        launch = launch_of(started, self.settings)
        try:
            launcher = self._launcher(started)
            self._fetched.note(started)
            prepare(started, launch.folder)
            launcher.start(launch)
            if launcher.on_this_machine:  # on another machine the next poll shows whether it has arrived
                self._seen.add((started.id, started.attempts))
        except NotNow as error:
            self.jobs.queue_again(started.id, step=str(error))
        except LLMPruneError as error:
            self._fail(started, 1, error=str(error))
        except OSError as error:
            self._fail(started, 1, error=f"its folder cannot be written: {error}; free some space and retry")

    def _launcher(self, job: Job) -> Launcher:
        """Return the launcher of a job. Raises LLMPruneError where the service no longer offers it."""
        if job.launcher not in self.launchers:
            raise LLMPruneError(_not_offered(job))
        return self.launchers[job.launcher]

    def _fail(self, job: Job, code: int | None, *, error: str) -> None:
        """Fail a job that did not run."""
        self._drop_token(job)
        self.jobs.end(job.id, Outcome("failed", code, error))

    def _drop_token(self, job: Job) -> None:
        with suppress(OSError):  # the job's folder may be the cause of the failure
            drop_token(self.settings.folder(job.id), self.settings.log(job.id))


def _not_offered(job: Job) -> str:
    return f"the service runs without the launcher {job.launcher!r} now"
