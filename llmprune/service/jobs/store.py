"""The table of jobs. Every change of state is one transaction that also writes an event."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from typing import Any, get_args

from llmprune.service.jobs.database import Database
from llmprune.service.jobs.job import (
    ACTIVE,
    ENDED,
    FINISHED,
    SUMMARY_COLUMNS,
    VERDICTS,
    Job,
    JobSummary,
    NewJob,
    State,
    job_of,
    summary_of,
)
from llmprune.service.jobs.store_reads import (
    Conflict,
    QueueFull,
    Term,
    one,
    require_no_push,
    require_pushable,
    row_of,
    visible,
)

_SHOWN = ("state", "step", "done", "total", "fraction", "seconds_left", "attempts", "exit_code", "error")


class Jobs:
    """Reads and changes jobs. Times are shown to people and never compared."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(
        self,
        job: str,
        new: NewJob,
        *,
        max_queued: int,
        max_jobs: int,
    ) -> tuple[Job, bool]:
        """Queue a job under the id ``job``, or return the one that this owner, key and digest made before.

        Also whether it is new. Raises Conflict where the key came with another digest, QueueFull beyond ``max_queued``
        waiting jobs or ``max_jobs`` jobs in all.
        """
        owner, key, digest, request = new.owner, new.key, new.digest, new.request
        with self.database.write() as connection:
            known = one(connection, "SELECT digest, job FROM idempotency WHERE owner = ? AND key = ?", owner, key)
            if known is not None:
                if known["digest"] != digest:
                    raise Conflict(f"the idempotency key {key!r} was used for another submission; use a new one")
                return job_of(row_of(connection, known["job"])), False
            if request.source is not None:
                require_pushable(connection, request.source)
            waiting = one(connection, "SELECT count(*) n FROM jobs WHERE owner = ? AND state = 'queued'", owner)
            if waiting is not None and waiting["n"] >= max_queued:
                raise QueueFull(f"{owner} has {waiting['n']} jobs in the queue, and {max_queued} are allowed")
            kept = one(connection, "SELECT count(*) n FROM jobs WHERE owner = ?", owner)
            if kept is not None and kept["n"] >= max_jobs:
                raise QueueFull(
                    f"{owner} has {kept['n']:,} jobs, and {max_jobs:,} are kept; delete some that have ended"
                )
            values = {
                "id": job, "owner": owner, "model": new.model, "recipe": new.recipe,
                "overrides": json.dumps(list(new.overrides)), "state": "queued", "created": time.time(),
            } | request.columns()  # fmt: skip
            names = ", ".join(values)
            connection.execute(
                f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(values))})", [*values.values()]
            )
            if key is not None:
                connection.execute("INSERT INTO idempotency VALUES (?, ?, ?, ?)", (owner, key, digest, job))
            _note(connection, job)
            return job_of(row_of(connection, job)), True

    def get(self, job: str) -> Job | None:
        """The job of this id."""
        rows = self.database.read("SELECT * FROM jobs WHERE id = ?", (job,))
        return job_of(rows[0]) if rows else None

    def page(
        self,
        states: Sequence[State] = (),
        owner: str | None = None,
        *,
        search: str | None = None,
        before: int | None = None,
        limit: int = 50,
        source: str | None = None,
        viewer: str | None,
    ) -> tuple[list[JobSummary], int | None]:
        """The newest first, and the place where the next page begins.

        Only jobs of ``viewer`` and shared ones; None: all jobs.
        """
        terms: list[Term] = []
        if states:
            terms.append((f"state IN ({', '.join('?' * len(states))})", [*states]))
        if owner is not None:
            terms.append(("owner = ?", [owner]))
        if source is not None:
            terms.append(("source = ?", [source]))
        if search:
            terms.append(("(instr(lower(name), ?) OR instr(lower(model), ?) OR id = ?)", [search.lower()] * 3))
        if before is not None:
            terms.append(("seq < ?", [before]))
        sql, values = visible(f"seq, {SUMMARY_COLUMNS}", terms, viewer=viewer)
        rows = self.database.read(f"{sql} ORDER BY seq DESC LIMIT ?", [*values, limit + 1])
        more = rows[limit - 1]["seq"] if len(rows) > limit else None
        return [summary_of(row) for row in rows[:limit]], more

    def counts(self, *, viewer: str | None) -> dict[State, int]:
        """How many jobs of ``viewer`` and shared ones are in each state; None: of all jobs."""
        sql, values = visible("state", [], viewer=viewer)
        rows = self.database.read(f"SELECT state, count(*) n FROM ({sql}) GROUP BY state", values)
        found = {row["state"]: row["n"] for row in rows}
        return {state: found.get(state, 0) for state in get_args(State)}

    def pushed(self) -> set[str]:
        """The jobs whose models are on their way to the hub."""
        marks = ", ".join("?" * (1 + len(ACTIVE)))
        sql = f"SELECT source FROM jobs WHERE source IS NOT NULL AND state IN ({marks})"
        return {row["source"] for row in self.database.read(sql, ("queued", *ACTIVE))}

    def in_states(self, *states: State) -> list[Job]:
        """Jobs in these states in the order in which they should start."""
        marks = ", ".join("?" * len(states))
        sql = f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY priority DESC, seq"
        return [job_of(row) for row in self.database.read(sql, states)]

    def cancel(self, job: str) -> Job:
        """A queued job is cancelled at once, a running one from now on. Raises Conflict where it has ended."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            state = row["state"]
            if state == "queued":
                _change(connection, job, **_cancelled(row), finished=time.time())
            elif state == "running":
                _change(connection, job, state="cancelling")
            elif state != "cancelling":
                raise Conflict(f"the job has ended ({state}) and cannot be cancelled")
            return job_of(row_of(connection, job))

    def retry(self, job: str) -> Job:
        """Queue an ended job again; it continues its run folder. Raises Conflict where that makes no sense."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["state"] in FINISHED:
                raise Conflict("the job has its result, and a retry gives the same; change the recipe in a new job")
            if row["state"] not in ("failed", "cancelled"):
                raise Conflict(f"the job is {row['state']}; only failed and cancelled jobs can be tried again")
            require_no_push(connection, job)
            if row["source"] is not None:
                require_pushable(connection, row["source"])
            gone: dict[str, Any] = {"cleaned": 0, "reevaluate": None} if row["cleaned"] else {}  # made anew
            _change(connection, job, state="queued", **_FRESH, **gone, error=None, ran_before=row["ran_seconds"])
            return job_of(row_of(connection, job))

    def reevaluate(self, job: str, limit: int) -> Job:
        """Queue a finished job to evaluate its model on so many samples a task. Raises Conflict."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["source"] is not None or row["state"] not in FINISHED:
                raise Conflict(f"job {job} is {_words(row)}; only the model of a finished job can be evaluated again")
            if row["cleaned"]:
                raise Conflict(f"the clean-up has taken the model of job {job}; run its recipe again with more samples")
            require_no_push(connection, job)
            _change(connection, job, state="queued", **_FRESH, reevaluate=limit, ran_before=row["ran_seconds"])
            return job_of(row_of(connection, job))

    def start(self, job: str, devices: Sequence[str]) -> Job | None:
        """Mark a queued job as running, once more; None where it is no longer queued."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["state"] != "queued":
                return None
            step = "starting" if row["source"] is None else "pushing to the hub"
            step = step if row["reevaluate"] is None else "evaluation of more samples"
            values = {"devices": json.dumps(list(devices)), "attempts": row["attempts"] + 1, "step": step}
            _change(connection, job, state="running", started=time.time(), **values)
            return job_of(row_of(connection, job))

    def progress(self, job: str, ran_seconds: float, *, news: dict[str, Any]) -> None:
        """Note how long a job has run and, where it says something new, how far it is."""
        with self.database.write() as connection:
            if news:
                _change(connection, job, kind="progress", ran_seconds=ran_seconds, **news)
            else:
                connection.execute("UPDATE jobs SET ran_seconds = ? WHERE id = ?", (ran_seconds, job))

    def end(
        self,
        job: str,
        state: State,
        *,
        exit_code: int | None,
        error: str | None,
        ran_seconds: float | None = None,
        **results: str | None,
    ) -> None:
        """Note how a running job ended; ``ran_seconds`` in all; ``results``: figures or published, as JSON."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["state"] not in ACTIVE:
                return
            ended: dict[str, Any] = {"exit_code": exit_code, "error": error, **results}
            ended |= {"devices": "[]", "seconds_left": None, "finished": time.time()}
            if state in FINISHED:
                ended |= {"step": None, "done": None, "total": None, "fraction": 1.0, "reevaluate": None}
            if ran_seconds is not None:
                ended["ran_seconds"] = round(ran_seconds, 2)
            settled = _cancelled(row) if state == "cancelled" else {"state": state}
            if settled["state"] in FINISHED and state == "cancelled":
                ended |= {"error": row["error"], "exit_code": None}
            _change(connection, job, **ended | settled)

    def give_up(self, job: str, error: str) -> None:
        """Fail a job that cannot be run or looked after, whether it waits or runs."""
        with self.database.write() as connection:
            if row_of(connection, job)["state"] not in ENDED:
                ended: dict[str, Any] = {"devices": "[]", "seconds_left": None, "finished": time.time()}
                _change(connection, job, state="failed", exit_code=None, error=error, **ended)

    def queue_again(self, job: str) -> None:
        """Put a job back whose process ended together with the service; it continues."""
        with self.database.write() as connection:
            if row_of(connection, job)["state"] == "running":
                _change(connection, job, state="queued", devices="[]", seconds_left=None)

    def cleaned(self, job: str) -> None:
        """Note that the clean-up has taken a job's model."""
        with self.database.write() as connection:
            _change(connection, job, kind="cleaned", cleaned=1)

    def delete(self, job: str) -> None:
        """Forget an ended job. Raises Conflict where it has not ended."""
        with self.database.write() as connection:
            state = row_of(connection, job)["state"]
            if state not in ENDED:
                raise Conflict(f"the job is {state}; cancel it first")
            require_no_push(connection, job)
            connection.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def events(self, job: str, after: int, *, limit: int = 500) -> list[sqlite3.Row]:
        """Rows of id, kind, data and at, the oldest first."""
        sql = "SELECT id, kind, data, at FROM events WHERE job = ? AND id > ? ORDER BY id LIMIT ?"
        return self.database.read(sql, (job, after, limit))


_FRESH: dict[str, Any] = {
    "step": None, "done": None, "total": None, "fraction": 0.0, "seconds_left": None, "exit_code": None,
    "finished": None,
}  # fmt: skip


def _cancelled(row: sqlite3.Row) -> dict[str, Any]:
    """The columns of a cancelled job. One that evaluated more samples has its earlier verdict again."""
    figures = summary_of(row).figures
    if row["reevaluate"] is None or figures is None:
        return {"state": "cancelled"}
    verdict = figures.gate_verdict or ("fail" if figures.gate_passed is False else "pass")
    done = {"step": None, "done": None, "total": None, "fraction": 1.0}
    return {"state": VERDICTS[verdict], "reevaluate": None, **done}


def _words(row: sqlite3.Row) -> str:
    return "a push" if row["source"] is not None else str(row["state"]).replace("_", " ")


def _change(connection: sqlite3.Connection, job: str, *, kind: str = "state", **values: Any) -> None:
    columns = ", ".join(f"{name} = ?" for name in values)
    connection.execute(f"UPDATE jobs SET {columns} WHERE id = ?", [*values.values(), job])
    _note(connection, job, kind=kind)


def _note(connection: sqlite3.Connection, job: str, *, kind: str = "state") -> None:
    now = summary_of(row_of(connection, job))
    data = json.dumps({"id": job} | {name: getattr(now, name) for name in _SHOWN})
    connection.execute("INSERT INTO events (job, kind, data, at) VALUES (?, ?, ?, ?)", (job, kind, data, time.time()))
