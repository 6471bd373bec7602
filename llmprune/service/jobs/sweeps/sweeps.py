"""Sweeps: several jobs from one recipe, which differ in the values of some keys."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from llmprune.common.errors import RecipeError
from llmprune.results.formatting import short_model_name
from llmprune.service.database.database import Database, Row
from llmprune.service.jobs.hub_token import keep_token
from llmprune.service.jobs.job import SUMMARY_COLUMNS, NewJob, summary_of
from llmprune.service.jobs.launcher_checks import has_data_folder
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.submission import Submission, cancel, new_job
from llmprune.service.jobs.sweeps.axes import Axis, Sweep, SweepJob, SweepSummary, describe_point, points_of
from llmprune.service.jobs.sweeps.shared_scores import shared_keys, write_group
from llmprune.service.settings import Settings
from llmprune.service.users.quotas import Demand, check_quota, default_quotas
from llmprune.service.users.tokens import Caller

_AXES = TypeAdapter(tuple[Axis, ...])
_MAX_NAME = 120
_NEWEST = 30  # sweeps of a list


@dataclass(frozen=True)
class SweepSubmission:
    """A recipe, the axes of a sweep, and the settings of all of its jobs. ``base.name`` is the sweep's name."""

    base: Submission
    axes: tuple[Axis, ...]

    def digest(self) -> str:
        """Return a digest of everything that an idempotency key stands for."""
        axes = [axis.model_dump() for axis in self.axes]
        return hashlib.sha256(json.dumps([self.base.digest(), axes]).encode()).hexdigest()


def new_jobs(
    sweep: SweepSubmission, caller: Caller, *, settings: Settings, jobs: JobStore
) -> list[tuple[tuple[str, ...], NewJob]]:
    """Return a checked job for each point. Raises RecipeError with the problems of all points."""
    base, found, problems = sweep.base, [], []
    points = points_of(sweep.axes)
    for point in points:
        words = describe_point(sweep.axes, point)
        overrides = [*base.overrides, *(f"{axis.key}={value}" for axis, value in zip(sweep.axes, point, strict=True))]
        one = replace(base, overrides=overrides, key=None, hub_token=None)
        try:
            new = new_job(one, caller, settings=settings, jobs=jobs)
            name = f"{base.name or short_model_name(new.model)}: {words}"[:_MAX_NAME]
            found.append((point, replace(new, request=new.request.model_copy(update={"name": name}))))
        except RecipeError as error:
            problems += [(problem, words) for problem in error.problems]
    if problems:
        raise RecipeError(_grouped(problems, len(points)), "sweep")
    return found


def submit_sweep(sweep: SweepSubmission, caller: Caller, *, settings: Settings, jobs: JobStore) -> tuple[Sweep, bool]:
    """Queue all jobs of a sweep or none; return the sweep, and whether it is new.

    Raises RecipeError, Conflict and QueueFull.
    """
    key, digest = sweep.base.key, sweep.digest()
    known = _known(jobs.database, caller.name, key=key, digest=digest)
    if known is not None:
        return known, False
    planned = new_jobs(sweep, caller, settings=settings, jobs=jobs)
    made = [secrets.token_hex(6) for _ in planned]
    row = (
        *(
            secrets.token_hex(6),
            caller.name,
            int(sweep.base.shared),
            sweep.base.name or _name(planned[0][1], sweep.axes),
        ),
        *(_AXES.dump_json(sweep.axes).decode(), time.time(), key, digest),
    )
    shared = scores_shared([new for _, new in planned], settings)
    quotas, is_queued = default_quotas(settings), False
    try:
        if sweep.base.hub_token:  # stored before the jobs are queued: the supervisor may start them at once
            for job in made:
                keep_token(settings.folder(job), sweep.base.hub_token)
        with jobs.database.write() as connection:
            number = len(planned)
            demand = Demand(number, number, number, gpus=max(new.request.gpus for _, new in planned))
            check_quota(connection, caller.name, demand=demand, defaults=quotas)  # of all, before the first is counted
            connection.execute("INSERT INTO sweeps VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            for place, (job, (point, new)) in enumerate(zip(made, planned, strict=True)):
                jobs.add(job, new, quotas=quotas, connection=connection)
                connection.execute(
                    "INSERT INTO sweep_jobs VALUES (?, ?, ?, ?)", (job, row[0], place, json.dumps(point))
                )
                if new.scores in shared:
                    write_group(connection, job, group=f"{row[0]} {new.scores}")
        is_queued = True
    finally:
        if not is_queued:
            for job in made:
                shutil.rmtree(settings.folder(job), ignore_errors=True)
    found = find_sweep(jobs.database, row[0])
    assert found is not None, "it was written above"
    return found, True


def scores_shared(planned: Sequence[NewJob], settings: Settings) -> dict[str, int]:
    """Return the keys of the scores that several jobs of a sweep need, with the number of these jobs.

    Machines without the data folder share none, because a job's scores are not there before it has ended.
    """
    there = [new.scores if has_data_folder(new.request.launcher, settings) else None for new in planned]
    return shared_keys(there)


def find_sweep(database: Database, sweep: str) -> Sweep | None:
    """Return a sweep with its jobs; None where there is none."""
    rows = database.read("SELECT * FROM sweeps WHERE id = ?", (sweep,))
    if not rows:
        return None
    columns = ", ".join(f"jobs.{column}" for column in SUMMARY_COLUMNS.split(", "))
    reads = "(SELECT used FROM uses WHERE uses.job = jobs.id AND part = 'scores') AS reads"
    sql = f"SELECT point, {reads}, {columns} FROM sweep_jobs JOIN jobs ON jobs.id = job WHERE sweep = ? ORDER BY place"
    jobs = [
        SweepJob(point=tuple(json.loads(row["point"])), job=summary_of(row), scores_of=row["reads"])
        for row in database.read(sql, (sweep,))
    ]
    return Sweep(**_summary(rows[0]).model_dump(), jobs=jobs)


def list_sweeps(database: Database, viewer: str | None) -> list[SweepSummary]:
    """Return the newest sweeps that a viewer may see and that have jobs; None: those of everybody."""
    mine = "" if viewer is None else "(owner = ? OR shared = 1) AND "
    sql = (
        f"SELECT * FROM sweeps WHERE {mine}EXISTS (SELECT 1 FROM sweep_jobs WHERE sweep = sweeps.id) "
        "ORDER BY created DESC, id LIMIT ?"
    )
    return [_summary(row) for row in database.read(sql, [*([] if viewer is None else [viewer]), _NEWEST])]


def sweep_of_job(database: Database, job: str) -> SweepSummary | None:
    """Return the sweep that a job belongs to."""
    rows = database.read("SELECT sweeps.* FROM sweeps JOIN sweep_jobs ON sweep = sweeps.id WHERE job = ?", (job,))
    return _summary(rows[0]) if rows else None


def cancel_sweep(sweep: Sweep, settings: Settings, *, jobs: JobStore) -> int:
    """Cancel every job of a sweep that has not ended; return their number."""
    cancelled = 0
    for one in sweep.jobs:
        found = jobs.get(one.job.id)
        if found is not None and not found.ended:
            with suppress(Conflict):  # it has just ended
                cancel(found, settings, jobs=jobs)
                cancelled += 1
    return cancelled


def _known(database: Database, owner: str, *, key: str | None, digest: str) -> Sweep | None:
    """Return the sweep that was made with this idempotency key. Raises Conflict where it was another one."""
    if key is None:
        return None
    rows = database.read("SELECT id, digest FROM sweeps WHERE owner = ? AND idempotency_key = ?", (owner, key))
    if rows and rows[0]["digest"] != digest:
        raise Conflict(f"the idempotency key {key!r} was used for another sweep; use a new one")
    return find_sweep(database, rows[0]["id"]) if rows else None


def _summary(row: Row) -> SweepSummary:
    values = {name: row[name] for name in ("id", "name", "owner", "created")}
    return SweepSummary(**values, shared=bool(row["shared"]), axes=_AXES.validate_json(row["axes"]))


def _name(first: NewJob, axes: Sequence[Axis]) -> str:
    """Return the name of a sweep: that of the model, and what differs."""
    keys = ", ".join(axis.key.rsplit(".", 1)[-1] for axis in axes)
    return f"{short_model_name(first.model)} by {keys}"[:_MAX_NAME]


def _grouped(problems: Sequence[tuple[str, str]], points: int) -> list[str]:
    """Return each problem once, with the points that it is about unless it is about all."""
    found: dict[str, list[str]] = {}
    for problem, words in problems:
        found.setdefault(problem, []).append(words)
    return [text if len(words) == points else f"{'; '.join(words[:3])}: {text}" for text, words in found.items()]
