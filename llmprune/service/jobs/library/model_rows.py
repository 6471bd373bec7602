"""Rows of the model library, which follow the rows of their jobs."""

from __future__ import annotations

import math
from typing import Any

from llmprune.service.database.database import Database, Transaction
from llmprune.service.jobs.job import Figures, JobSummary

NOT_MEASURED = -1.0
_LARGEST = 1e300  # stands for an infinite figure, which no cursor of a list can hold


def record_model(connection: Transaction, job: JobSummary, *, seq: int) -> None:
    """Write the library's row of a job that has figures; its labels stay. Jobs without a result have no row."""
    if job.figures is None or job.source is not None:
        return
    values: dict[str, Any] = {
        "seq": seq, "owner": job.owner, "shared": int(job.shared), "name": job.name.lower(), "base": job.model,
        "finished": job.finished or job.created, "words": f"{job.name} {job.model} {job.id}".lower(),
        **_sort_keys(job.figures),
    }  # fmt: skip
    names = ", ".join(values)
    updates = ", ".join(f"{name} = excluded.{name}" for name in values)
    connection.execute(
        f"INSERT INTO models (job, {names}) VALUES (?, {', '.join('?' * len(values))}) "
        f"ON CONFLICT (job) DO UPDATE SET {updates}",
        [job.id, *values.values()],
    )


def kept_models(database: Database) -> set[str]:
    """Return the jobs whose models no clean-up may delete: approved ones, and uploads, which no job makes again."""
    sql = "SELECT job FROM models WHERE stage = 'approved' UNION SELECT id FROM jobs WHERE uploaded = 1"
    return {row["job"] for row in database.read(sql)}


def _sort_keys(figures: Figures) -> dict[str, float]:
    dense, pruned = figures.speed or (0.0, 0.0)
    return {
        "parameters": figures.parameters[1],
        "bytes": figures.bytes[1],
        "size": _key(figures.bytes[1] / figures.bytes[0] if figures.bytes[0] else None),
        "retention": _key(figures.retention),
        "speed": _key(pruned / dense if dense else None),
    }


def _key(value: float | None) -> float:
    """Return a number that sorts: NOT_MEASURED where there is none."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    return max(min(value, _LARGEST), -_LARGEST)
