"""The supervisor: starts what waits, looks after what runs, ends what must end.

    python -m llmprune.service.supervisor.supervisor   (settings as one line of JSON on standard input)

It keeps nothing in memory that the table and the launchers do not have, so that it may die at
any instant. A line on standard input wakes it, ``stop`` ends it with its jobs, and when the
input closes the service has died: then the jobs go on, and the next supervisor finds them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llmprune.common.errors import LLMPruneError
from llmprune.service.jobs.database import Database
from llmprune.service.jobs.hub_token import drop_token
from llmprune.service.jobs.job import ACTIVE, VERDICTS, Job
from llmprune.service.jobs.store import Jobs
from llmprune.service.logs import log_with_time
from llmprune.service.settings import Settings
from llmprune.service.supervisor.attempts import launch_of
from llmprune.service.supervisor.cleanup import clean_up, over_quota
from llmprune.service.supervisor.devices import Machine
from llmprune.service.supervisor.isolation import Isolation
from llmprune.service.supervisor.launchers import make_launchers
from llmprune.service.supervisor.launchers.base import Launch
from llmprune.service.supervisor.overuse import overuse, shorten
from llmprune.service.supervisor.progress import PROGRESS, explain, read_figures, read_progress, read_published

logger = logging.getLogger(__name__)

TICK = 0.5  # seconds
NOTE_EVERY = 3.0  # how often it writes what nobody waits for: each write goes to disk
CLEAN_EVERY = 60.0
WEIGH_EVERY = 1.0  # how often it looks at the memory of all processes
MAX_RESTARTS = 25  # of a job that ends together with the service again and again
_WAITS = {"step": "waiting for the cluster"}


class Supervisor:
    """One round after another over the table. Only one runs on a data folder at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.jobs = Jobs(Database(settings.database))
        self.launchers = make_launchers(settings)
        self.machine = Machine(settings.gpus, settings.slots)
        self._isolation = Isolation()
        self._elsewhere = {name for name, launcher in self.launchers.items() if not launcher.on_this_machine}
        self._seen: set[tuple[str, int]] = set()  # attempts that this supervisor started or saw alive
        self._asked_to_end: dict[str, float] = {}  # since when, by time.monotonic()
        self._ran: dict[str, float] = {}  # seconds that are not in the table yet
        self._beaten = float("-inf")
        self._last = time.monotonic()
        self._cleaned = float("-inf")
        self._weighed = float("-inf")
        self._overused: dict[str, str] = {}  # why a job was ended at once
        self._full = False

    def round(self) -> None:
        """Look after every running job, then start what can start."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        if now - self._beaten >= NOTE_EVERY:
            self._beaten = now
            self._beat(now)
        for job in self.jobs.in_states(*ACTIVE):
            self._isolated(job, partial(self._look_after, job, elapsed))
        if now - self._weighed >= WEIGH_EVERY:
            self._weighed = now
            self._isolation.attempt("looking at memory and logs", self._end_overuse)
        if now - self._cleaned >= CLEAN_EVERY:
            self._cleaned = now
            self._isolation.attempt("the clean-up", self._clean_up)
        if not self._full:
            self._isolation.attempt("starting jobs", self._start_waiting)

    def _clean_up(self) -> None:
        clean_up(self.settings, self.jobs)
        self._full = over_quota(self.settings)

    def _isolated(self, job: Job, work: Callable[[], object]) -> bool:
        """Do something for one job; whether it can be gone on with. Where it cannot, the job fails and says why."""
        damaged = set(job.unreadable) - {"figures", "published"}  # these are only shown
        if damaged:
            self._abandon(job, f"its row in the job table is damaged ({', '.join(sorted(damaged))}); submit it again")
            return False
        error = self._isolation.attempt(f"job {job.id}", work)
        if error is not None:
            said = str(error) if isinstance(error, LLMPruneError) else f"{type(error).__name__}: {error}"
            self._abandon(job, f"the service cannot go on with it: {said}; retry, or tell the operator")
        return error is None

    def _abandon(self, job: Job, said: str) -> None:
        """End the processes of a job as far as they can be ended, and fail it."""
        launcher = self.launchers.get(job.launcher)
        if launcher is not None:
            self._isolation.attempt(f"ending job {job.id}", partial(self._stop, job))
        self._isolation.attempt(f"failing job {job.id}", partial(self._give_up, job, said))

    def _stop(self, job: Job) -> None:
        self.launchers[job.launcher].stop(self._launch(job), force=True)

    def _give_up(self, job: Job, said: str) -> None:
        self._forget_token(job)
        self.jobs.give_up(job.id, said)

    def stop(self) -> None:
        """End this machine's jobs and queue them again: the next service continues them."""
        mine = [job for job in self.jobs.in_states("running") if job.launcher not in self._elsewhere]
        while mine:
            mine = [job for job in mine if self._isolated(job, partial(self._ask_to_end, job))]
            time.sleep(0.1)
            ended: list[str] = []
            mine = [job for job in mine if self._isolated(job, partial(self._put_back, job, ended))]
            mine = [job for job in mine if job.id not in ended]

    def _ask_to_end(self, job: Job) -> None:
        self._end_processes(job, self._launch(job))

    def _put_back(self, job: Job, ended: list[str]) -> None:
        """Queue a job again whose processes have ended, and add it to ``ended``."""
        look = self.launchers[job.launcher].look(self._launch(job))
        if look.state == "running":
            return
        ended.append(job.id)
        if look.code in (0, 2, 3):  # it was faster
            self._end(job, look.code)
        else:
            self.jobs.progress(job.id, round(job.ran_seconds + self._ran.pop(job.id, 0.0), 2), news={})
            self.jobs.queue_again(job.id)

    def _beat(self, now: float) -> None:
        with self.jobs.database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO heartbeat VALUES (1, ?, ?)", (now, self._full))

    def _look_after(self, job: Job, elapsed: float) -> None:
        launcher, launch = self.launchers.get(job.launcher), self._launch(job)
        if launcher is None:
            return self._fail(job, None, said=f"the service runs without the launcher {job.launcher!r} now")
        look = launcher.look(launch)
        if look.state == "unknown":
            return None
        if look.state == "ended":
            return self._end(job, look.code, elapsed=elapsed)
        if look.state == "returned" and job.state == "running":
            return self._returned(job)
        if look.state in ("gone", "returned"):
            return self._gone(job)
        self._seen.add((job.id, job.attempts))
        waiting = look.state == "waiting"
        told = _WAITS if waiting else read_progress(launch.folder, job.fraction)
        ran = self._note_progress(job, told, elapsed=0.0 if waiting else elapsed)
        if job.state == "cancelling" or ran - job.ran_before > self._time_limit(job):
            self._end_processes(job, launch)
        return None

    def _time_limit(self, job: Job) -> float:
        """The seconds that a job may run. One that was queued without a limit has the service's."""
        return job.time_limit or self.settings.time_limit or float("inf")

    def _note_progress(self, job: Job, told: dict[str, Any], *, elapsed: float) -> float:
        """Write what is new; the seconds that the job has run."""
        self._ran[job.id] = self._ran.get(job.id, 0.0) + elapsed
        ran = job.ran_seconds + self._ran[job.id]
        news = told if any(getattr(job, name) != value for name, value in told.items()) else {}
        if news or self._ran[job.id] >= NOTE_EVERY:
            self.jobs.progress(job.id, round(ran, 2), news=news)
            del self._ran[job.id]
        return ran

    def _end_processes(self, job: Job, launch: Launch) -> None:
        """SIGTERM once, and SIGKILL after the grace."""
        since = self._asked_to_end.get(job.id)
        if since is None:
            self._asked_to_end[job.id] = time.monotonic()
            self.launchers[job.launcher].stop(launch, force=False)
        elif time.monotonic() - since > self.settings.grace:
            self.launchers[job.launcher].stop(launch, force=True)

    def _end_overuse(self) -> None:
        """End at once what takes too much; a later look finds it ended."""
        for job, said in overuse(self.jobs.in_states(*ACTIVE), self._elsewhere, settings=self.settings):
            if job.launcher in self.launchers:
                logger.warning("job %s is ended: %s", job.id, said)
                self._overused.setdefault(job.id, said)
                self._isolated(job, partial(self._stop, job))

    def _returned(self, job: Job) -> None:
        """A cluster had no room for it for a long time."""
        if job.attempts < MAX_RESTARTS:
            return self.jobs.queue_again(job.id)
        said = f"the cluster had no room for it {job.attempts} times; ask for fewer than {job.gpus} GPUs, or retry"
        return self._fail(job, None, said=said)

    def _gone(self, job: Job) -> None:
        """No process and no exit code: it was killed, or ended together with an earlier service."""
        if job.state == "cancelling" or (job.id, job.attempts) in self._seen or job.attempts >= MAX_RESTARTS:
            return self._end(job, None)
        logger.info("job %s ended together with the service: it continues", job.id)
        return self.jobs.queue_again(job.id)

    def _end(self, job: Job, code: int | None, *, elapsed: float = 0.0) -> None:
        """Note how an attempt ended. A run that was faster than its cancellation counts as what it is.

        ``elapsed``: seconds since the last look, which may be all that it ran.
        """
        self._asked_to_end.pop(job.id, None)
        ran = job.ran_seconds + self._ran.pop(job.id, 0.0)
        if (job.id, job.attempts) in self._seen:
            ran += elapsed
        launch = self._launch(job)
        if job.launcher not in self._elsewhere:
            self.launchers[job.launcher].stop(launch, force=True)  # what the run may have left behind
        shorten(launch.log, self.settings.log_limit)
        drop_token(launch.folder, launch.log)
        overused = self._overused.pop(job.id, None)
        run = self.settings.run_folder(job.id)
        figures = read_figures(run) if code in (0, 3) else None
        shown = figures.model_dump_json() if figures else None
        if code == 0:
            self.jobs.end(
                job.id,
                "succeeded",
                exit_code=code,
                error=None,
                ran_seconds=ran,
                figures=shown,
                published=read_published(run),
            )
        elif code == 3 and figures and figures.gate_verdict not in (None, "pass"):
            assert figures.gate_verdict is not None, "just looked at"
            verdict = VERDICTS[figures.gate_verdict]
            self.jobs.end(
                job.id, verdict, exit_code=code, error=explain(launch.log, code), ran_seconds=ran, figures=shown
            )
        elif job.state == "cancelling" and code not in (2, 3):
            self.jobs.end(job.id, "cancelled", exit_code=code, error=None, ran_seconds=ran)
        elif overused is not None and code not in (2, 3):
            self.jobs.end(job.id, "failed", exit_code=code, error=overused, ran_seconds=ran)
        elif ran - job.ran_before > (limit := self._time_limit(job)) and code not in (2, 3):
            said = f"it ran longer than its limit of {limit:,.15g} s; a retry continues after the last layer"
            self.jobs.end(job.id, "failed", exit_code=code, error=said, ran_seconds=ran)
        else:
            self.jobs.end(job.id, "failed", exit_code=code, error=explain(launch.log, code), ran_seconds=ran)

    def _start_waiting(self) -> None:
        waiting = self.jobs.in_states("queued")
        asked = self._elsewhere & {job.launcher for job in waiting}
        room = dict.fromkeys(self._elsewhere, 0)
        for name in asked:
            self._isolation.attempt(f"asking {name} for room", partial(self._ask_for_room, name, room))
        waiting = [job for job in waiting if not job.unreadable or self._isolated(job, lambda: None)]
        for job, devices in self.machine.startable(waiting, self.jobs.in_states(*ACTIVE), elsewhere=room):
            self._isolated(job, partial(self._start, job, devices))

    def _ask_for_room(self, name: str, room: dict[str, int]) -> None:
        room[name] = self.launchers[name].room()

    def _start(self, job: Job, devices: list[str]) -> None:
        started = self.jobs.start(job.id, devices)
        if started is None:
            return
        launch = self._launch(started)
        try:
            launcher = self.launchers.get(started.launcher)
            if launcher is None:
                raise LLMPruneError(f"the service runs without the launcher {started.launcher!r} now")
            self._prepare(started, launch.folder)
            launcher.start(launch)
            if launcher.on_this_machine:  # elsewhere the next look says whether it has arrived
                self._seen.add((started.id, started.attempts))
        except LLMPruneError as error:
            self._fail(started, 1, said=str(error))
        except OSError as error:
            self._fail(started, 1, said=f"its folder cannot be written: {error}; make room and retry")

    def _fail(self, job: Job, code: int | None, *, said: str) -> None:
        """End a job that did not run."""
        self._forget_token(job)
        self.jobs.end(job.id, "failed", exit_code=code, error=said)

    def _forget_token(self, job: Job) -> None:
        with suppress(OSError):  # its folder may be what is wrong
            drop_token(self.settings.folder(job.id), self.settings.log(job.id))

    def _prepare(self, job: Job, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROGRESS).unlink(missing_ok=True)
        (folder / "recipe.yaml").write_bytes(job.recipe.encode())

    def _launch(self, job: Job) -> Launch:
        return launch_of(job, self.settings)


def main() -> None:
    """Supervise until told to stop or until the service is gone."""
    log_with_time()
    settings = Settings.model_validate_json(_first_line(sys.stdin.fileno()))
    with (settings.data_dir / "supervisor.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an earlier one may still be on its way out
        supervise(settings)


def supervise(settings: Settings) -> None:
    """Round after round, as standard input says."""
    supervisor = Supervisor(settings)
    while True:
        try:
            supervisor.round()
        except (sqlite3.OperationalError, OSError) as error:  # a full disk: nothing is lost, the next round tries again
            logger.warning("the table cannot be used (%s); trying again", error)
        if select.select([sys.stdin], [], [], TICK)[0]:
            word = os.read(sys.stdin.fileno(), 4096)
            if b"stop" in word:
                return supervisor.stop()
            if not word:
                return None


def _first_line(descriptor: int) -> bytes:
    """A line, and not a byte more: what follows is for select."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


if __name__ == "__main__":
    main()
