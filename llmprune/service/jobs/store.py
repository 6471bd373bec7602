"""The job table. Every change of a job is one transaction that also writes an event."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, get_args

from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.jobs.fair_order import count_start
from llmprune.service.jobs.job import (
    ACTIVE,
    ENDED,
    FINISHED,
    JOB_COLUMNS,
    SUMMARY_COLUMNS,
    Job,
    JobPage,
    JobQuery,
    NewJob,
    Outcome,
    State,
    job_of,
    summary_of,
)
from llmprune.service.jobs.library.model_rows import record_model
from llmprune.service.jobs.run_times import record_run_time
from llmprune.service.jobs.store_reads import (
    Conflict,
    cancelled_columns,
    first_row,
    newest,
    numbers_by_state,
    placeholders,
    require_made_here,
    require_no_push,
    retried_columns,
    row_of,
    terms_of,
)
from llmprune.service.jobs.uses import forget_scores, record_uses, require_recorded, require_unused, take_scores
from llmprune.service.notifications.outbox import notify_end, write_default_targets, write_targets
from llmprune.service.users.quotas import Demand, Quotas, require_quota, require_quota_again

_NOTHING_LEFT: dict[str, Any] = {"seconds_left": None, "run_seconds_left": None, "detail": None}
_EVENT_FIELDS = (
    "state", "step", "done", "total", "detail", "fraction", "seconds_left",
    "run_seconds_left", "attempts", "exit_code", "error",
)  # fmt: skip


class JobStore:
    """Reads and changes jobs. Times are for display and never compared."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._parsed: dict[Sequence[State], dict[str, tuple[Row, Job]]] = {}  # by states and id: the last rows and jobs

    def add(self, job: str, new: NewJob, *, quotas: Quotas, connection: Transaction | None = None) -> tuple[Job, bool]:
        """Queue a job under the id ``job``, or return the one that this owner, key and digest made before.

        Return the job, and whether it is new. Raises Conflict where the key came with another digest, QueueFull where
        a quota of the owner is reached; ``quotas``: those of an owner without quotas of their own. ``connection``: of
        an open transaction.
        """
        owner, key, digest, request = new.owner, new.key, new.digest, new.request
        with nullcontext(connection) if connection else self.database.write() as connection:
            known = first_row(connection, "SELECT digest, job FROM idempotency WHERE owner = ? AND key = ?", owner, key)
            if known is not None:
                if known["digest"] != digest:
                    raise Conflict(f"the idempotency key {key!r} was used for another submission; use a new one")
                return job_of(row_of(connection, known["job"])), False
            if request.source is not None:
                require_no_push(connection, request.source)
            require_quota(connection, owner, demand=Demand(gpus=request.gpus), defaults=quotas)
            values = {
                "id": job, "owner": owner, "model": new.model, "recipe": new.recipe,
                "overrides": json.dumps(list(new.overrides)), "state": "queued", "created": time.time(),
            } | request.columns()  # fmt: skip
            names = ", ".join(values)
            connection.execute(
                f"INSERT INTO jobs ({names}) VALUES ({', '.join('?' * len(values))})", [*values.values()]
            )
            record_uses(connection, job, uses=new.uses)
            if key is not None:
                connection.execute("INSERT INTO idempotency VALUES (?, ?, ?, ?)", (owner, key, digest, job))
            if new.notify is None:
                write_default_targets(connection, job, owner=owner)
            else:
                write_targets(connection, job, targets=new.notify)
            write_event(connection, job)
            return job_of(row_of(connection, job)), True

    def get(self, job: str) -> Job | None:
        """Return the job of this id; None where there is none."""
        rows = self.database.read(f"SELECT {JOB_COLUMNS} FROM jobs WHERE id = ?", (job,))
        return job_of(rows[0]) if rows else None

    def page(self, query: JobQuery) -> JobPage:
        """Return the jobs of a query."""
        terms = terms_of(query, like=self.database.like)
        rows = self.database.read(*newest(f"seq, {SUMMARY_COLUMNS}", terms, viewer=query.viewer, limit=query.limit + 1))
        more = rows[query.limit - 1]["seq"] if len(rows) > query.limit else None
        return JobPage([summary_of(row) for row in rows[: query.limit]], more)

    def counts(self, *, viewer: str | None) -> dict[State, int]:
        """Count the jobs of ``viewer`` and shared ones by state; None: all jobs."""
        found: Counter[State] = Counter()
        for row in self.database.read(*numbers_by_state(viewer=viewer)):
            found[row["state"]] += row["n"]
        return {state: found[state] for state in get_args(State)}

    def in_states(self, *states: State) -> list[Job]:
        """Return the jobs in these states, in the order in which they should start."""
        marks = placeholders(states)
        sql = f"SELECT {JOB_COLUMNS} FROM jobs WHERE state IN ({marks}) ORDER BY priority DESC, seq"
        known, found = self._parsed.get(states, {}), {}
        for row in self.database.read(sql, states):
            before = known.get(row["id"])  # the supervisor asks twice a second, and most jobs have not changed
            found[row["id"]] = before if before is not None and before[0] == row else (row, job_of(row))
        self._parsed[states] = found
        return [job for _, job in found.values()]

    def cancel(self, job: str) -> Job:
        """Cancel a queued job at once, or mark a running one as cancelling. Raises Conflict where it has ended."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            state = row["state"]
            if state == "queued":
                _change(connection, job, **cancelled_columns(row), finished=time.time())
            elif state == "running":
                _change(connection, job, state="cancelling")
            elif state != "cancelling":
                raise Conflict(f"the job has ended ({state}) and cannot be cancelled")
            return job_of(row_of(connection, job))

    def retry(self, job: str, *, quotas: Quotas) -> Job:
        """Queue a failed or cancelled job again; it continues its run folder. Raises Conflict and QueueFull."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["state"] in FINISHED:
                raise Conflict("the job has its result, and a retry gives the same; change the recipe in a new job")
            if row["state"] not in ("failed", "cancelled"):
                raise Conflict(f"the job is {row['state']}; only failed and cancelled jobs can be tried again")
            require_unused(connection, job)
            if row["source"] is not None:
                require_no_push(connection, row["source"])
            forget_scores(connection, job)
            require_recorded(connection, job)
            require_quota_again(connection, row, defaults=quotas)
            _change(connection, job, state="queued", **_FRESH, **retried_columns(row))
            return job_of(row_of(connection, job))

    def reevaluate(self, job: str, limit: int, *, quotas: Quotas) -> Job:
        """Queue a finished job to evaluate ``limit`` samples for each task. Raises Conflict and QueueFull."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["source"] is not None or row["state"] not in FINISHED:
                raise Conflict(
                    f"job {job} is {_description(row)}; only the model of a finished job can be evaluated again"
                )
            require_made_here(row)
            if row["cleaned"]:
                raise Conflict(
                    f"the clean-up has deleted the model of job {job}; run its recipe again with more samples"
                )
            require_unused(connection, job, parts=("run", "scores"))  # the model stays as it is
            require_quota_again(connection, row, defaults=quotas)
            _change(connection, job, state="queued", **_FRESH, reevaluate=limit, ran_before=row["ran_seconds"])
            return job_of(row_of(connection, job))

    def start(self, job: str, devices: Sequence[str], *, scores_of: str | None = None) -> Job | None:
        """Mark a queued job as running and count the attempt; return None where it is no longer queued.

        ``scores_of``: the job whose scores it begins with, unless that one is deleted.
        """
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["state"] != "queued":
                return None
            count_start(connection, row["owner"])
            step = "starting" if row["source"] is None else "pushing to the hub"
            step = step if row["reevaluate"] is None else "evaluation of more samples"
            values = {"devices": json.dumps(list(devices)), "attempts": row["attempts"] + 1, "step": step}
            if scores_of is not None:
                take_scores(connection, job, of=scores_of)
            _change(connection, job, state="running", started=time.time(), **values)
            return job_of(row_of(connection, job))

    def progress(self, job: str, ran_seconds: float, *, news: dict[str, Any]) -> None:
        """Write how long a job has run, and ``news``, the changed columns of its progress."""
        with self.database.write() as connection:
            if news:
                _change(connection, job, kind="progress", ran_seconds=ran_seconds, **news)
            else:
                connection.execute("UPDATE jobs SET ran_seconds = ? WHERE id = ?", (ran_seconds, job))

    def end(self, job: str, outcome: Outcome, *, ran_seconds: float | None = None) -> None:
        """Write how a running job ended. ``ran_seconds``: of all attempts; None: unchanged."""
        with self.database.write() as connection:
            row = row_of(connection, job)
            if row["state"] not in ACTIVE:
                return
            ended: dict[str, Any] = {"exit_code": outcome.exit_code, "error": outcome.error, **outcome.results}
            ended |= {"devices": "[]", **_NOTHING_LEFT, "finished": time.time()}
            if outcome.state in FINISHED:
                ended |= {"step": None, "done": None, "total": None, "fraction": 1.0, "reevaluate": None}
            if ran_seconds is not None:
                ended["ran_seconds"] = round(ran_seconds, 2)
            was_cancelled = outcome.state == "cancelled"
            settled = cancelled_columns(row) if was_cancelled else {"state": outcome.state}
            if settled["state"] in FINISHED and was_cancelled:
                ended |= {"error": row["error"], "exit_code": None}
            _change(connection, job, **ended | settled)
            if ran_seconds is not None:
                record_run_time(connection, row, state=settled["state"], seconds=round(ran_seconds, 2))

    def give_up(self, job: str, error: str) -> None:
        """Fail a job that cannot continue, whether it waits or runs."""
        with self.database.write() as connection:
            if row_of(connection, job)["state"] not in ENDED:
                ended: dict[str, Any] = {"devices": "[]", **_NOTHING_LEFT, "finished": time.time()}
                _change(connection, job, state="failed", exit_code=None, error=error, **ended)

    def queue_again(self, job: str, *, step: str | None = None) -> None:
        """Queue a running job again that ended together with the service or its node. ``step``: why, for people."""
        with self.database.write() as connection:
            if row_of(connection, job)["state"] == "running":
                news = {**_NOTHING_LEFT, "step": step, "done": None, "total": None}
                _change(connection, job, state="queued", devices="[]", **news)

    def clean(self, job: str, move_away: Callable[[], object]) -> bool:
        """Move an ended job's model away and record that; return False where another job needs its files."""
        with self.database.write() as connection:
            if row_of(connection, job)["state"] not in ENDED:  # it was retried meanwhile
                return False
            try:
                require_unused(connection, job)
            except Conflict:
                return False
            move_away()
            _change(connection, job, kind="cleaned", cleaned=1)
            return True

    def delete(self, *jobs: str) -> None:
        """Delete ended jobs from the table, all of them or none. Raises Conflict where one has not ended or is used."""
        with self.database.write() as connection:
            for job in jobs:
                state = row_of(connection, job)["state"]
                if state not in ENDED:
                    raise Conflict(f"job {job} is {state}; cancel it first")
                require_unused(connection, job, by_sweeps=True)
                connection.execute("INSERT INTO artifact_removals (job) VALUES (?) ON CONFLICT DO NOTHING", (job,))
                connection.execute("DELETE FROM jobs WHERE id = ?", (job,))

    def events(self, job: str, after: int, *, limit: int = 500) -> list[Row]:
        """Return a job's events after the event ``after``: rows of id, kind, data and at, the oldest first."""
        sql = "SELECT id, kind, data, at FROM events WHERE job = ? AND id > ? ORDER BY id LIMIT ?"
        return self.database.read(sql, (job, after, limit))


_FRESH: dict[str, Any] = {
    "step": None, "done": None, "total": None, "fraction": 0.0, "exit_code": None, "finished": None,
    **_NOTHING_LEFT,
}  # fmt: skip


def _description(row: Row) -> str:
    return "a push" if row["source"] is not None else str(row["state"]).replace("_", " ")


def _change(connection: Transaction, job: str, *, kind: str = "state", **values: Any) -> None:
    columns = ", ".join(f"{name} = ?" for name in values)
    connection.execute(f"UPDATE jobs SET {columns} WHERE id = ?", [*values.values(), job])
    write_event(connection, job, kind=kind)
    if values.get("state") in ENDED:
        notify_end(connection, row_of(connection, job))


def write_event(connection: Transaction, job: str, *, kind: str = "state", **more: Any) -> None:
    """Write an event with the present state of a job, and ``more`` fields; the model library follows the job."""
    row = row_of(connection, job)
    now = summary_of(row)
    data = json.dumps({"id": job} | {name: getattr(now, name) for name in _EVENT_FIELDS} | more)
    connection.execute("INSERT INTO events (job, kind, data, at) VALUES (?, ?, ?, ?)", (job, kind, data, time.time()))
    if kind != "progress":
        record_model(connection, now, seq=row["seq"])
