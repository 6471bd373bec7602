"""Bases: finished jobs whose models other jobs prune. A base keeps its model while such a job has not ended."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.service.jobs.database import Database, Transaction
from llmprune.service.jobs.job import ENDED, FINISHED
from llmprune.service.jobs.store_reads import Conflict, first_row, row_of


def add_base(connection: Transaction, job: str, *, base: str) -> None:
    """Record the job whose model another job prunes. Raises Conflict where the model was deleted meanwhile."""
    row = first_row(connection, "SELECT state, cleaned FROM jobs WHERE id = ?", base)
    if row is None or row["cleaned"] or row["state"] not in FINISHED:
        raise Conflict(f"the model of job {base}, which the recipe starts from, was deleted; choose another model")
    connection.execute("INSERT INTO bases (job, base) VALUES (?, ?)", (job, base))


def bases_in_use(database: Database) -> set[str]:
    """Return the jobs whose models are bases of jobs that have not ended."""
    marks, ended = _ended()
    sql = f"SELECT DISTINCT base FROM bases JOIN jobs ON id = job WHERE state NOT IN ({marks})"
    return {row["base"] for row in database.read(sql, ended)}


def require_no_use(connection: Transaction, job: str) -> None:
    """Raise Conflict while a job that has not ended starts from the model of this one."""
    marks, ended = _ended()
    sql = f"SELECT id, owner FROM jobs JOIN bases ON id = job WHERE base = ? AND state NOT IN ({marks})"
    user = first_row(connection, sql, job, *ended)
    if user is None:
        return
    who = f"job {user['id']}" if user["owner"] == row_of(connection, job)["owner"] else "a job of another user"
    raise Conflict(f"{who} starts from the model of this one; wait until it has ended")


def _ended() -> tuple[str, Sequence[str]]:
    return ", ".join("?" * len(ENDED)), ENDED
