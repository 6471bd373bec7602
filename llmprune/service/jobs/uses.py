"""Uses: jobs that need files of another one until they have ended, which keeps these files from being deleted.

A push and a follow-up read the run folder of a job, or its scores alone; a recipe may start from the model of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from llmprune.service.artifacts.parts import Part, Use
from llmprune.service.database.database import Database, Transaction
from llmprune.service.jobs.job import ACTIVE, ENDED
from llmprune.service.jobs.store_reads import Conflict, first_row, placeholders, require_made_here, row_of

PARTS: tuple[Part, ...] = get_args(Part)
_UNDER_WAY = ("queued", *ACTIVE)


def record_uses(connection: Transaction, job: str, *, uses: Iterable[Use]) -> None:
    """Record the files that a new job needs. Raises Conflict where they are not there; see ``require_files``."""
    for use in uses:
        require_files(connection, use)
        connection.execute("INSERT INTO uses (job, used, part) VALUES (?, ?, ?)", (job, use.job, use.part))


def require_recorded(connection: Transaction, job: str) -> None:
    """Raise Conflict where the files that a job needs are not there any more."""
    for row in connection.execute("SELECT used, part FROM uses WHERE job = ? ORDER BY part", (job,)).fetchall():
        require_files(connection, Use(row["used"], row["part"]))


def require_files(connection: Transaction, use: Use) -> None:
    """Raise Conflict where a job does not have what another one needs: a finished model, or a folder with scores."""
    needed = "scores" if use.part == "scores" else "model"
    row = first_row(connection, "SELECT * FROM jobs WHERE id = ?", use.job)
    if row is None:
        raise Conflict(f"the job {use.job}, whose {needed} it needs, was deleted; submit a recipe as a new job")
    if row["state"] not in ENDED or row["figures"] is None:
        state = str(row["state"]).replace("_", " ")
        raise Conflict(f"job {use.job} is {state} and has no finished model; wait for it, or choose another job")
    if use.part != "model":  # a model alone is read without the journal and the recipe of its folder
        require_made_here(row)
    if use.part != "scores" and row["cleaned"]:
        raise Conflict(f"the clean-up has deleted the model of job {use.job}; run its recipe again, then ask for this")


def take_scores(connection: Transaction, job: str, *, of: str) -> None:
    """Record that a job of a sweep begins with the scores of another one, unless that was deleted; it may still run."""
    sql = "INSERT INTO uses (job, used, part) SELECT ?, id, 'scores' FROM jobs WHERE id = ? ON CONFLICT DO NOTHING"
    connection.execute(sql, (job, of))


def forget_scores(connection: Transaction, job: str) -> None:
    """Forget whose scores a job of a sweep began with: it is given some anew when it starts again."""
    sql = "DELETE FROM uses WHERE job = ? AND part = 'scores' AND job IN (SELECT id FROM jobs WHERE work IS NULL)"
    connection.execute(sql, (job,))


def require_unused(
    connection: Transaction, job: str, *, parts: Sequence[Part] = PARTS, by_sweeps: bool = False
) -> None:
    """Raise Conflict while a job that has not ended needs one of these parts of a job's files.

    ``by_sweeps``: also while a job of a sweep needs the scores, which only a deletion takes away.
    """
    parts_and_states = (*parts, *_UNDER_WAY)
    sql = (
        "SELECT id, owner FROM jobs JOIN uses ON uses.job = id "
        f"WHERE used = ? AND part IN ({placeholders(parts)}) AND state IN ({placeholders(_UNDER_WAY)})"
    ) + ("" if by_sweeps else " AND (part <> 'scores' OR work IS NOT NULL)")
    reader = first_row(connection, sql, job, *parts_and_states)
    if reader is None:
        return
    if reader["owner"] != row_of(connection, job)["owner"]:
        raise Conflict(f"a job of another user reads the files of job {job}; wait for it, or ask an admin to cancel it")
    raise Conflict(f"job {reader['id']} reads the files of job {job}; wait for it, or cancel it")


def jobs_in_use(database: Database) -> set[str]:
    """Return the jobs whose files others need that have not ended."""
    sql = f"SELECT DISTINCT used FROM uses JOIN jobs ON id = uses.job WHERE state IN ({placeholders(_UNDER_WAY)})"
    return {row["used"] for row in database.read(sql, _UNDER_WAY)}
