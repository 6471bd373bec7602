"""How long finished jobs ran, by their owner, recipe and devices: the estimate for the next job of the same kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.jobs.job import FINISHED, Job

_MOST_VALUES = 400  # of one query


@dataclass(frozen=True)
class RunTimes:
    """Seconds that earlier jobs of the same kind ran."""

    runs: int
    last: float
    shortest: float
    longest: float


def known_run_times(database: Database, jobs: Sequence[Job]) -> dict[str, RunTimes]:
    """Return the run times of earlier jobs of the same kinds, by the id of the job; a job without any is left out."""
    kinds = {job.id: _kind(_columns(job)) for job in jobs}
    rows: dict[str, RunTimes] = {}
    wanted = sorted(set(kinds.values()))
    for begin in range(0, len(wanted), _MOST_VALUES):
        part = wanted[begin : begin + _MOST_VALUES]
        sql = f"SELECT * FROM run_times WHERE kind IN ({', '.join('?' * len(part))})"
        for row in database.read(sql, part):
            rows[row["kind"]] = RunTimes(row["runs"], row["last"], row["shortest"], row["longest"])
    return {job: rows[kind] for job, kind in kinds.items() if kind in rows}


def record_run_time(connection: Transaction, row: Mapping[str, Any] | Row, *, state: str, seconds: float) -> None:
    """Record the run time of a job that has ended, where it ran from beginning to end in one attempt.

    ``row``: of the job table, before the end; ``state``: afterwards.
    """
    whole = row["attempts"] == 1 and not row["ran_before"] and row["reevaluate"] is None
    if state not in FINISHED or not whole:
        return
    connection.execute(
        "INSERT INTO run_times (kind, runs, last, shortest, longest) VALUES (?, 1, ?, ?, ?) "
        "ON CONFLICT (kind) DO UPDATE SET runs = run_times.runs + 1, last = excluded.last, "
        "shortest = CASE WHEN excluded.last < run_times.shortest THEN excluded.last ELSE run_times.shortest END, "
        "longest = CASE WHEN excluded.last > run_times.longest THEN excluded.last ELSE run_times.longest END",
        (_kind(row), seconds, seconds, seconds),
    )


def _columns(job: Job) -> dict[str, Any]:
    """Return a job's values as its row has them."""
    push = job.push.model_dump_json() if job.push else None
    return job.model_dump() | {"overrides": json.dumps(list(job.overrides)), "push": push}


def _kind(row: Mapping[str, Any] | Row) -> str:
    """Return a digest of everything that the run time depends on, and of the owner, whose jobs others need not see."""
    names = ("owner", "recipe", "overrides", "launcher", "gpus", "push", "reevaluate")
    return hashlib.sha256(json.dumps([row[name] for name in names]).encode()).hexdigest()
