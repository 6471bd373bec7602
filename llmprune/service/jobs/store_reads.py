"""Queries of the job table that several changes share, and the conditions that forbid a change."""

from __future__ import annotations

from typing import Any

from llmprune.service.jobs.database import Row, Transaction
from llmprune.service.jobs.job import ACTIVE, ENDED, FINISHED, VERDICTS, JobQuery, summary_of
from llmprune.service.jobs.work import Work

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


def first_row(connection: Transaction, sql: str, *values: Any) -> Row | None:
    """Return the first row of a query."""
    row: Row | None = connection.execute(sql, values).fetchone()
    return row


def row_of(connection: Transaction, job: str) -> Row:
    """Return a job's row. Raises NoSuchJob."""
    row = first_row(connection, "SELECT * FROM jobs WHERE id = ?", job)
    if row is None:
        raise NoSuchJob(f"there is no job {job!r}")
    return row


def require_pushable(connection: Transaction, job: str) -> None:
    """Raise Conflict where a job has no finished model, or is being pushed already."""
    row = first_row(connection, "SELECT * FROM jobs WHERE id = ?", job)
    if row is None:
        raise Conflict(f"the job {job}, whose model was to be pushed, was deleted")
    if row["state"] not in ENDED or row["figures"] is None:
        raise Conflict(f"job {job} is {row['state']} and has no finished model to push; push it when it has succeeded")
    if row["cleaned"]:
        raise Conflict(f"the clean-up has deleted the model of job {job}; run its recipe again, then push that")
    require_made_here(row)
    require_no_push(connection, job)


def require_parent(connection: Transaction, job: str, *, work: Work | None) -> None:
    """Raise Conflict where a job does not have what a follow-up reads: a finished model, or a folder with scores."""
    needs = "model" if work is None else work.needs
    row = first_row(connection, "SELECT * FROM jobs WHERE id = ?", job)
    if row is None:
        raise Conflict(f"the job {job}, whose {needs} it needs, was deleted; submit a recipe as a new job")
    if row["state"] not in FINISHED or row["figures"] is None:
        state = "has no model" if row["state"] in FINISHED else f"is {row['state']}"
        raise Conflict(f"job {job} {state}; only a job with a finished model has follow-ups")
    require_made_here(row)
    if needs == "model" and row["cleaned"]:
        raise Conflict(f"the clean-up has deleted the model of job {job}; run its recipe again, then ask for this")


def require_unused(connection: Transaction, job: str, *, by_sweeps: bool = False) -> None:
    """Raise Conflict while a job's model is being pushed or a follow-up reads its folder.

    ``by_sweeps``: also while a job of a sweep runs that began with its scores.
    """
    require_no_push(connection, job)
    reader = _under_way(connection, "reads", job=job, more="" if by_sweeps else " AND work IS NOT NULL")
    if reader is None:
        return
    if reader["owner"] != row_of(connection, job)["owner"]:
        raise Conflict(f"a job of another user reads the files of job {job}; wait for it, or ask an admin to cancel it")
    raise Conflict(f"job {reader['id']} reads the files of job {job}; wait for it, or cancel it")


def _under_way(connection: Transaction, column: str, *, job: str, more: str = "") -> Row | None:
    """Return a job that waits or runs and has this job in a column. ``more``: further conditions."""
    states = ("queued", *ACTIVE)
    sql = f"SELECT id, owner FROM jobs WHERE {column} = ? AND state IN ({', '.join('?' * len(states))}){more}"
    return first_row(connection, sql, job, *states)


def require_made_here(row: Row) -> None:
    """Raise Conflict for an uploaded run: its journal and its recipe have not passed the policy of this service."""
    if row["uploaded"]:
        raise Conflict(f"job {row['id']} was uploaded; evaluate or push its model where it was made")


def require_no_push(connection: Transaction, job: str) -> None:
    """Raise Conflict while a job's model is being pushed."""
    push = _under_way(connection, "source", job=job)
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
    """Return the columns of a job that is tried again. One of a sweep is given scores anew when it starts."""
    from_start = {"cleaned": 0, "reevaluate": None} if row["cleaned"] else {}
    reads = row["reads"] if row["work"] else None
    return from_start | {"error": None, "ran_before": row["ran_seconds"], "reads": reads}
