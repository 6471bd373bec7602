"""The evaluation of more samples of a finished job's model."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from llmprune.common.errors import RecipeError
from llmprune.evaluation.more_samples import next_limit
from llmprune.recipe.evaluation import Evaluation, recorded_tasks
from llmprune.results.figures.evaluation import GateFigures
from llmprune.service.jobs.job import BY_TASK, FINISHED, Job
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.submission import queue_again
from llmprune.service.settings import Settings
from llmprune.service.users.quotas import default_quotas


def reevaluate(job: Job, limit: int | None, *, hub_token: str | None, settings: Settings, jobs: JobStore) -> Job:
    """Queue a finished job to evaluate its model on more samples.

    ``limit``: samples for each task; None: as many as the gate needs. Raises RecipeError where more are of no use,
    Conflict where the job has no finished model, and QueueFull.
    """
    quotas = default_quotas(settings)
    if job.state not in FINISHED or job.source is not None or job.cleaned or job.uploaded:
        return jobs.reevaluate(job.id, limit or 1, quotas=quotas)  # raises Conflict with the reason
    samples = samples_of(job, limit, settings=settings)
    return queue_again(
        job,
        hub_token,
        settings=settings,
        jobs=jobs,
        queue=lambda: jobs.reevaluate(job.id, samples, quotas=quotas),
        states=FINISHED,
    )


def can_reevaluate(job: Job, settings: Settings) -> bool:
    """Return whether the tasks of a finished job have documents that were not evaluated yet."""
    if job.state not in FINISHED or job.source is not None or job.cleaned or job.uploaded:
        return False
    try:
        samples_of(job, 2**31, settings=settings)
    except (RecipeError, Conflict):
        return False
    return True


def report_of(job: Job, settings: Settings) -> dict[str, Any]:
    """Return the report of a finished job as JSON data. Raises Conflict where it cannot be read."""
    try:
        found = json.loads((settings.run_folder(job.id) / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(job) from error
    if not isinstance(found, dict):
        raise _unreadable(job)
    return found


def evaluated(job: Job, settings: Settings) -> Evaluation:
    """Return tasks and limits of a job's last evaluation. Raises Conflict where its report cannot be read."""
    try:
        return recorded_tasks(report_of(job, settings)["recipe"]["evaluation"])
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise _unreadable(job) from error


def samples_of(job: Job, limit: int | None, *, settings: Settings) -> int:
    """Return the samples for each task that an evaluation of more samples uses, or BY_TASK.

    Raises RecipeError and Conflict.
    """
    report, had = report_of(job, settings), evaluated(job, settings)
    try:
        gate = GateFigures.model_validate(report["gate"], strict=False) if report["gate"] else None
        documents = [(task.get("group") or task["task"], task.get("documents")) for task in report["tasks"]]
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise _unreadable(job) from error
    if not documents:
        raise RecipeError("the recipe names no tasks, so there are no samples to evaluate", "evaluation")
    try:
        samples = next_limit(gate, had, documents=documents, wanted=limit)
    except RecipeError as error:
        raise RecipeError([problem.replace("--limit", "limit") for problem in error.problems], "evaluation") from error
    return samples if isinstance(samples, int) else limit or BY_TASK


def _unreadable(job: Job) -> Conflict:
    return Conflict(f"the report of job {job.id} cannot be read; submit its recipe as a new job")
