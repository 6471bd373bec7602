"""Changes of who may read a job and of who owns it."""

from __future__ import annotations

from llmprune.common.errors import RecipeError
from llmprune.service.jobs.database import Database
from llmprune.service.jobs.job import Job, job_of
from llmprune.service.jobs.store import write_event
from llmprune.service.jobs.store_reads import first_row, row_of
from llmprune.service.jobs.users import SOURCE

_AT_A_TIME = 500  # jobs in one transaction


def set_shared(database: Database, job: str, *, shared: bool) -> Job:
    """Let every user read a job, or only its owner and admins. Raises NoSuchJob."""
    with database.write() as connection:
        if bool(row_of(connection, job)["shared"]) != shared:
            connection.execute("UPDATE jobs SET shared = ? WHERE id = ?", (int(shared), job))
            write_event(connection, job, kind="shared")
        return job_of(row_of(connection, job))


def transfer(database: Database, owner: str, *, to: str) -> int:
    """Give all jobs and sweeps of a user to another user; return how many jobs.

    Raises RecipeError where there is no such user.
    """
    if owner == to:
        raise RecipeError(f"the jobs of {owner} belong to {to} already; name another user", SOURCE)
    moved = 0
    while True:
        with database.write() as connection:
            known = first_row(connection, "SELECT disabled FROM users WHERE name = ?", to)
            if known is None or known["disabled"]:
                raise RecipeError(f"there is no user {to!r} who may have jobs; name one who is not disabled", SOURCE)
            sql = "SELECT id FROM jobs WHERE owner = ? ORDER BY seq LIMIT ?"
            found = [row["id"] for row in connection.execute(sql, (owner, _AT_A_TIME)).fetchall()]
            for job in found:
                connection.execute("UPDATE jobs SET owner = ? WHERE id = ?", (to, job))
                write_event(connection, job, kind="owner")
            connection.execute("UPDATE sweeps SET owner = ?, idempotency_key = NULL WHERE owner = ?", (to, owner))
        moved += len(found)
        if len(found) < _AT_A_TIME:
            return moved
