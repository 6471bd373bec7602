"""Tables of jobs on other machines: lost nodes, sizes of clusters, objects in the artefact store."""

from __future__ import annotations

import json

from llmprune.service.database.database import Database
from llmprune.service.jobs.job import Job

MAX_LOSSES = 5  # of a job's nodes in a row, without progress in between
_SHOWN = 3


def note_lost_node(database: Database, job: Job, *, machine: str) -> str | None:
    """Count the loss of a job's node; return why the job must end, None where it continues on another node."""
    with database.write() as connection:
        row = connection.execute("SELECT * FROM node_losses WHERE job = ?", (job.id,)).fetchone()
        has_moved = row is None or job.fraction > row["fraction"] or job.ran_before != row["ran_before"]
        in_a_row = 1 if has_moved else row["in_a_row"] + 1
        machines = [machine] if has_moved else [*json.loads(row["machines"]), machine]
        connection.execute(
            "INSERT INTO node_losses (job, in_a_row, fraction, ran_before, machines) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (job) DO UPDATE SET in_a_row = excluded.in_a_row, fraction = excluded.fraction, "
            "ran_before = excluded.ran_before, machines = excluded.machines",
            (job.id, in_a_row, job.fraction, job.ran_before, json.dumps(machines)),
        )
    if in_a_row < MAX_LOSSES:
        return None
    named = list(dict.fromkeys(machines))
    others = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
    return (
        f"its node was lost {in_a_row} times in a row without progress in between "
        f"({', '.join(named[:_SHOWN])}{others}); look at the memory and the logs of these nodes, then retry"
    )


def write_node_gpus(database: Database, launcher: str, *, gpus: int) -> None:
    """Record how many GPUs the largest node of a cluster has."""
    if node_gpus(database, launcher) == gpus:
        return
    with database.write() as connection:
        connection.execute(
            "INSERT INTO clusters (launcher, node_gpus) VALUES (?, ?) "
            "ON CONFLICT (launcher) DO UPDATE SET node_gpus = excluded.node_gpus",
            (launcher, gpus),
        )


def node_gpus(database: Database, launcher: str) -> int | None:
    """Return how many GPUs the largest node of a cluster had when last seen; None where it was never seen."""
    rows = database.read("SELECT node_gpus FROM clusters WHERE launcher = ?", (launcher,))
    return int(rows[0]["node_gpus"]) if rows else None


def removals(database: Database) -> list[str]:
    """Return the deleted jobs whose objects are to be removed from the artefact store."""
    return [row["job"] for row in database.read("SELECT job FROM artifact_removals ORDER BY job LIMIT 100")]


def removed(database: Database, job: str) -> None:
    """Record that a deleted job has no more objects."""
    with database.write() as connection:
        connection.execute("DELETE FROM artifact_removals WHERE job = ?", (job,))


def note_lent(database: Database, job: str) -> None:
    """Record that the store has, or begins to have, files of a job of the service's machine."""
    with database.write() as connection:
        connection.execute("INSERT INTO lent_artifacts (job) VALUES (?) ON CONFLICT DO NOTHING", (job,))


def lent_jobs(database: Database) -> list[str]:
    """Return the jobs of the service's machine whose files are in the store."""
    return [row["job"] for row in database.read("SELECT job FROM lent_artifacts ORDER BY job")]


def returned(database: Database, job: str) -> None:
    """Record that the files of a job were removed from the store."""
    with database.write() as connection:
        connection.execute("DELETE FROM lent_artifacts WHERE job = ?", (job,))
