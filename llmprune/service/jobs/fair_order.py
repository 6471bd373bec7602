"""Order in which waiting jobs start: by priority, then in turn for each owner, then in the order of arrival."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llmprune.service.database.database import Database, Transaction
from llmprune.service.jobs.job import Job


def in_turn(waiting: Sequence[Job], running: Iterable[Job], *, last: Mapping[str, int]) -> list[Job]:
    """Order waiting jobs of equal priority so that owners take turns.

    An owner with fewer running and earlier jobs is first; of two with as many, the one whose last start (``last``) was
    longer ago. Many jobs of one user so keep nobody waiting. ``waiting``: in the order of priority and arrival.
    """
    held = Counter(job.owner for job in running)
    before: Counter[tuple[int, str]] = Counter()
    turns: dict[str, tuple[int, int, int]] = {}
    for job in waiting:
        place = (job.priority, job.owner)
        turns[job.id] = (-job.priority, held[job.owner] + before[place], last.get(job.owner, 0))
        before[place] += 1
    return sorted(waiting, key=lambda job: turns[job.id])


def count_start(connection: Transaction, owner: str) -> None:
    """Record in a transaction that a job of an owner starts now."""
    connection.execute(
        "INSERT INTO last_starts (owner, number) SELECT ?, coalesce(max(number), 0) + 1 FROM last_starts WHERE true "
        "ON CONFLICT (owner) DO UPDATE SET number = excluded.number",
        (owner,),
    )


def last_starts(database: Database) -> dict[str, int]:
    """Return the number of each owner's last start among all starts."""
    return {row["owner"]: row["number"] for row in database.read("SELECT owner, number FROM last_starts")}
