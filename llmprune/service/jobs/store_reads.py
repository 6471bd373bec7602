"""Queries of the job table that several changes share, and the conditions that forbid a change."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from llmprune.service.database.database import Row, Transaction
from llmprune.service.jobs.job import ACTIVE, JOB_COLUMNS, VERDICTS, JobQuery, summary_of

Term = tuple[str, list[Any]]  # a condition and its values


class Conflict(Exception):
    """The request does not fit the job's state, or an idempotency key was used for another submission."""


class QueueFull(Exception):
    """The owner has as many jobs as are allowed."""


class NoSuchJob(Exception):
    """The job was deleted since the caller looked it up."""


def terms_of(query: JobQuery, *, like: str) -> list[Term]:
    """Return the conditions of a query. ``like``: the operator that ignores case."""
    terms: list[Term] = []
    if query.states:
        terms.append((f"state IN ({', '.join('?' * len(query.states))})", [*query.states]))
    if query.owner is not None:
        terms.append(("owner = ?", [query.owner]))
    if query.source is not None:
        terms.append(("source = ?", [query.source]))
    if query.ids:
        terms.append((f"id IN ({', '.join('?' * len(query.ids))})", [*query.ids]))
    if query.made_from is not None:
        terms.append(("made_from = ?", [query.made_from]))
    if query.search:
        part = f"%{escaped(query.search)}%"
        sql = rf"(name {like} ? ESCAPE '\' OR model {like} ? ESCAPE '\' OR id = ?)"
        terms.append((sql, [part, part, query.search.lower()]))
    if query.before is not None:
        terms.append(("seq < ?", [query.before]))
    return terms


def newest(columns: str, terms: list[Term], *, viewer: str | None, limit: int) -> tuple[str, list[Any]]:
    """Return the SQL of the newest jobs that a viewer may see, and its values.

    The viewer's own jobs and shared ones are two halves, because no index serves an OR. Each half is read from an index
    in the order of arrival, and ends after ``limit`` rows.
    """
    halves = _halves(terms, viewer=viewer)
    parts = [f"SELECT {columns} FROM jobs {_where(half)} ORDER BY seq DESC LIMIT ?" for half in halves]
    values = [value for half in halves for value in [*_values(half), limit]]
    if len(parts) == 1:
        return parts[0], values
    union = " UNION ALL ".join(f"SELECT * FROM ({part}) AS half_{number}" for number, part in enumerate(parts))
    return f"{union} ORDER BY seq DESC LIMIT ?", [*values, limit]


def numbers_by_state(*, viewer: str | None) -> tuple[str, list[Any]]:
    """Return the SQL of the number of jobs in each state that a viewer may see, and its values."""
    halves = _halves([], viewer=viewer)
    parts = [f"SELECT state, count(*) AS n FROM jobs {_where(half)} GROUP BY state" for half in halves]
    return " UNION ALL ".join(parts), [value for half in halves for value in _values(half)]


def _halves(terms: list[Term], *, viewer: str | None) -> list[list[Term]]:
    if viewer is None:
        return [terms]
    return [[*terms, ("owner = ?", [viewer])], [*terms, ("shared = 1 AND owner <> ?", [viewer])]]


def _where(terms: list[Term]) -> str:
    return f"WHERE {' AND '.join(term for term, _ in terms)}" if terms else ""


def _values(terms: list[Term]) -> list[Any]:
    return [value for _, values in terms for value in values]


def escaped(part: str) -> str:
    """Return a text as part of a LIKE pattern whose escape character is the backslash."""
    return part.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_")


def placeholders(values: Sized) -> str:
    """Return a question mark for each value of an SQL list."""
    return ", ".join("?" * len(values))


def first_row(connection: Transaction, sql: str, *values: Any) -> Row | None:
    """Return the first row of a query."""
    row: Row | None = connection.execute(sql, values).fetchone()
    return row


def row_of(connection: Transaction, job: str) -> Row:
    """Return a job's row. Raises NoSuchJob."""
    row = first_row(connection, f"SELECT {JOB_COLUMNS} FROM jobs WHERE id = ?", job)
    if row is None:
        raise NoSuchJob(f"there is no job {job!r}")
    return row


def require_made_here(row: Row) -> None:
    """Raise Conflict for an uploaded run: its journal and its recipe have not passed the policy of this service."""
    if row["uploaded"]:
        raise Conflict(f"job {row['id']} was uploaded; evaluate or push its model where it was made")


def require_no_push(connection: Transaction, job: str) -> None:
    """Raise Conflict while a job's model is being pushed: two pushes at a time would mix their commits."""
    states = ("queued", *ACTIVE)
    sql = f"SELECT id, owner FROM jobs WHERE source = ? AND state IN ({', '.join('?' * len(states))})"
    push = first_row(connection, sql, job, *states)
    if push is not None and push["owner"] != row_of(connection, job)["owner"]:
        raise Conflict(f"the model of job {job} is being pushed by an admin; wait for that")
    if push is not None:
        raise Conflict(f"the model of job {job} is being pushed by job {push['id']}; wait for that, or cancel it")


def cancelled_columns(row: Row) -> dict[str, Any]:
    """Return the columns of a cancelled job; one that evaluated more samples gets its earlier verdict back."""
    figures = summary_of(row).figures
    if row["reevaluate"] is None or figures is None:
        return {"state": "cancelled"}
    verdict = figures.gate_verdict or ("fail" if figures.gate_passed is False else "pass")
    done = {"step": None, "done": None, "total": None, "fraction": 1.0}
    return {"state": VERDICTS[verdict], "reevaluate": None, **done}


def retried_columns(row: Row) -> dict[str, Any]:
    """Return the columns of a job that is tried again."""
    from_start = {"cleaned": 0, "reevaluate": None} if row["cleaned"] else {}
    return from_start | {"error": None, "ran_before": row["ran_seconds"]}
