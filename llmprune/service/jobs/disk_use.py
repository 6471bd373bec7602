"""Disk space of each job's folder, as the supervisor last measured it."""

from __future__ import annotations

from llmprune.service.database.database import Database

_AT_A_TIME = 500  # jobs in one pass
_STALE = (
    "SELECT j.id, j.state, j.attempts FROM jobs j LEFT JOIN job_disk d ON d.job = j.id "
    "WHERE (j.attempts > 0 OR j.uploaded = 1) AND (d.job IS NULL OR d.state <> j.state OR d.attempts <> j.attempts "
    "OR j.state IN ('running', 'cancelling')) ORDER BY j.seq DESC LIMIT ?"
)


def jobs_to_measure(database: Database) -> list[tuple[str, str, int]]:
    """Return id, state and attempts of running jobs, and of others that have changed since they were measured."""
    return [(row["id"], row["state"], row["attempts"]) for row in database.read(_STALE, (_AT_A_TIME,))]


def write_disk_use(database: Database, measured: list[tuple[str, int, str, int]]) -> None:
    """Store id, bytes, state and attempts of measured jobs; those that were deleted meanwhile are left out."""
    sql = (
        "INSERT INTO job_disk (job, bytes, state, attempts) SELECT id, ?, ?, ? FROM jobs WHERE id = ? "
        "ON CONFLICT (job) DO UPDATE SET bytes = excluded.bytes, state = excluded.state, attempts = excluded.attempts"
    )
    with database.write() as connection:
        for job, size, state, attempts in measured:
            connection.execute(sql, (size, state, attempts, job))


def forget_disk_use(database: Database, job: str) -> None:
    """Have a job measured again, because files of it were deleted."""
    with database.write() as connection:
        connection.execute("DELETE FROM job_disk WHERE job = ?", (job,))
