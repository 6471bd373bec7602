"""Changes of who may read a job and of who owns it."""

from __future__ import annotations

from llmprune.common.errors import RecipeError
from llmprune.service.database.database import Database, Transaction
from llmprune.service.jobs.job import Job, job_of
from llmprune.service.jobs.store import write_event
from llmprune.service.jobs.store_reads import first_row, row_of
from llmprune.service.users.users import SOURCE

_AT_A_TIME, _NO_LIMIT = 500, 2**62  # jobs in one transaction


def set_shared(database: Database, job: str, *, shared: bool) -> Job:
    """Let every user read a job, or only its owner and admins. Raises NoSuchJob."""
    with database.write() as connection:
        if bool(row_of(connection, job)["shared"]) != shared:
            connection.execute("UPDATE jobs SET shared = ? WHERE id = ?", (int(shared), job))
            write_event(connection, job, kind="shared")
        return job_of(row_of(connection, job))


def transfer(database: Database, owner: str, *, to: str) -> int:
    """Give all jobs and sweeps of a user to another one; return how many jobs. Raises RecipeError for unknown users."""
    moved = 0
    while True:
        with database.write() as connection:
            some = hand_over(connection, owner, to=to, limit=_AT_A_TIME)
        moved += some
        if some < _AT_A_TIME:
            return moved


def hand_over(connection: Transaction, owner: str, *, to: str, limit: int | None = None) -> int:
    """Give jobs of a user, the oldest first, and all sweeps to another one within a transaction.

    Return the number of jobs. ``limit``: maximum number of jobs. Raises RecipeError for an unknown new owner.
    """
    if owner == to:
        raise RecipeError(f"the jobs of {owner} belong to {to} already; name another user", SOURCE)
    known = first_row(connection, "SELECT disabled FROM users WHERE name = ?", to)
    if known is None or known["disabled"]:
        raise RecipeError(f"there is no user {to!r} who may have jobs; name one who is not disabled", SOURCE)
    sql = "SELECT id FROM jobs WHERE owner = ? ORDER BY seq LIMIT ?"
    jobs = [row["id"] for row in connection.execute(sql, (owner, _NO_LIMIT if limit is None else limit)).fetchall()]
    for job in jobs:
        connection.execute("UPDATE jobs SET owner = ? WHERE id = ?", (to, job))
        connection.execute("DELETE FROM idempotency WHERE job = ?", (job,))  # its key would lead the old owner to it
        write_event(connection, job, kind="owner")
    connection.execute("UPDATE sweeps SET owner = ?, idempotency_key = NULL WHERE owner = ?", (to, owner))
    return len(jobs)
