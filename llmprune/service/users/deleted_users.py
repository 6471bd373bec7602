"""Deletion of users. What a user has made is handed over to another one; everything that let the user in ends.

The name stays in ``deleted_users``: a sign-in at the OpenID provider would otherwise make the user again. An admin who
makes a user of this name, or lets the person sign in again (``readmit``), lifts that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.common.errors import RecipeError
from llmprune.results.formatting import plural
from llmprune.service.database.database import Database, Row, Transaction
from llmprune.service.jobs.sharing import hand_over
from llmprune.service.jobs.store_reads import first_row
from llmprune.service.users.users import SOURCE, no_user, require_an_admin, subject_digest

# Tables with rows of one user alone. Tokens, sessions and own quotas are deleted with the user's row.
_PRIVATE = ("drafts", "notify_defaults", "submitted_jobs", "last_starts", "idempotency")
_COUNTS = (
    "SELECT (SELECT count(*) FROM jobs WHERE owner = ?) AS jobs, "
    "(SELECT count(*) FROM sweeps AS s WHERE s.owner = ?) AS sweeps"
)


@dataclass(frozen=True)
class Owned:
    """Number of jobs and sweeps of a user, which another user has to get when the user is deleted."""

    jobs: int
    sweeps: int

    def __bool__(self) -> bool:
        return bool(self.jobs or self.sweeps)

    def __str__(self) -> str:
        counts = ((self.jobs, "job"), (self.sweeps, "sweep"))
        return " and ".join(plural(number, noun) for number, noun in counts if number)


def owned_by(database: Database, name: str) -> Owned:
    """Return how much a user has made."""
    return _owned(database.read(_COUNTS, (name, name)))


def _owned(rows: Sequence[Row]) -> Owned:
    return Owned(**dict(rows[0]))


def delete_user(database: Database, name: str, *, hand_over_to: str | None = None) -> int:
    """Delete a user in one transaction, after handing the user's jobs and sweeps over; return the number of jobs.

    Tokens, sessions and the draft end; waiting and running jobs continue as the new owner's. Uploads that are not
    complete are marked for deletion (``Uploads.remove_stale``). Raises RecipeError for an unknown user or new owner,
    for the last admin, and where there is something to hand over and nobody to get it.
    """
    moved = 0
    with database.write() as connection:
        user = first_row(connection, "SELECT role, disabled, subject FROM users WHERE name = ?", name)
        if user is None:
            raise no_user(name)
        if hand_over_to is not None:
            moved = hand_over(connection, name, to=hand_over_to)
        else:
            _require_nothing(connection, name)
        for table in _PRIVATE:
            connection.execute(f"DELETE FROM {table} WHERE owner = ?", (name,))
        connection.execute("DELETE FROM outbox WHERE owner = ? AND job IS NULL", (name,))  # tests
        connection.execute("UPDATE uploads SET owner = '', digest = id, changed = 0 WHERE owner = ?", (name,))
        connection.execute("DELETE FROM users WHERE name = ?", (name,))
        if user["role"] == "admin" and not user["disabled"]:
            require_an_admin(connection, name)
        subject = subject_digest(user["subject"]) if user["subject"] else None
        connection.execute(
            "INSERT INTO deleted_users (name, subject, deleted) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE "
            "SET subject = coalesce(excluded.subject, deleted_users.subject), deleted = excluded.deleted",
            (name, subject, time.time()),
        )
    return moved


def readmit(database: Database, name: str) -> bool:
    """Let a deleted user sign in at the OpenID provider again, as a new user; return False for an unknown name."""
    with database.write() as connection:
        return bool(connection.execute("DELETE FROM deleted_users WHERE name = ?", (name,)).rowcount)


def _require_nothing(connection: Transaction, name: str) -> None:
    """Raise RecipeError where a user has something that another one has to get."""
    if owned := _owned(connection.execute(_COUNTS, (name, name)).fetchall()):
        raise RecipeError(
            f"{name} has {owned}, with their models and files; name the user who gets them: --hand-over-to NAME, in "
            "the API hand_over_to",
            SOURCE,
        )
