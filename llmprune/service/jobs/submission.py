"""A submission: the recipe is let in, the wishes beside it are held against what the service has.

A push of a finished job's model is submitted too. It comes with a hub token of its own: the service's would be
everybody's, and one that came with the recipe would lie here as long as the job waits and runs.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.evaluation.more_samples import next_limit
from llmprune.recipe.hub import Hub
from llmprune.recipe.recipe import Recipe, refuse_tokens
from llmprune.recipe.width import Width
from llmprune.results.evaluation_figures import GateFigures
from llmprune.results.formatting import plural, short_model_name
from llmprune.service.jobs.hub_token import drop_token, keep_token
from llmprune.service.jobs.job import FINISHED, Job, JobRequest, NewJob, State
from llmprune.service.jobs.recipe_policy import admit
from llmprune.service.jobs.store import Jobs
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.tokens import Caller
from llmprune.service.settings import Settings


@dataclass(frozen=True)
class Submission:
    """What somebody wants to be run; what is None is for the service to choose."""

    recipe: str
    overrides: Sequence[str] = ()
    name: str | None = None
    launcher: str = "local"
    gpus: int | None = None
    priority: int = 0
    time_limit: float | None = None
    key: str | None = None
    hub_token: str | None = None
    shared: bool = False

    def digest(self) -> str:
        """What an idempotency key stands for; the hub token is no part of it."""
        wishes = (
            self.recipe,
            list(self.overrides),
            self.name,
            self.launcher,
            self.gpus,
            self.priority,
            self.time_limit,
            self.shared,
        )
        return hashlib.sha256(json.dumps(wishes).encode()).hexdigest()


def submit(submission: Submission, caller: Caller, *, settings: Settings, jobs: Jobs) -> tuple[Job, bool]:
    """Queue a job; whether it is new. Raises RecipeError, Conflict and QueueFull."""
    recipe, overrides = admit(submission.recipe, submission.overrides, settings=settings)
    request = _request(submission, recipe, caller=caller, settings=settings)
    new = NewJob(
        owner=caller.name,
        model=recipe.model.id,
        recipe=submission.recipe,
        overrides=overrides,
        request=request,
        key=submission.key,
        digest=submission.digest(),
    )
    return _add(settings, submission.hub_token, jobs=jobs, new=new)


def submit_push(
    source: Job,
    hub: Hub,
    *,
    hub_token: str | None,
    caller: Caller,
    settings: Settings,
    jobs: Jobs,
    key: str | None = None,
) -> tuple[Job, bool]:
    """Queue the push of a finished job's model; whether it is new. Raises RecipeError, Conflict and QueueFull."""
    _require_token(hub_token)
    refuse_tokens(hub.model_dump_json(), (), source="push")
    request = JobRequest(
        name=f"push to {hub.repo_id}"[:120], time_limit=settings.time_limit, source=source.id, push=hub
    )
    digest = hashlib.sha256(json.dumps([source.id, hub.model_dump_json()]).encode()).hexdigest()
    new = NewJob(
        owner=caller.name,
        model=source.model,
        recipe=source.recipe,
        overrides=source.overrides,
        request=request,
        key=key,
        digest=digest,
    )
    return _add(settings, hub_token, jobs=jobs, new=new)


def retry(job: Job, hub_token: str | None, *, settings: Settings, jobs: Jobs) -> Job:
    """Queue an ended job again, with a new hub token if one comes along. Raises RecipeError and Conflict."""
    if job.source is not None:
        _require_token(hub_token)
    return _queue_again(
        job, hub_token, settings=settings, jobs=jobs, queue=lambda: jobs.retry(job.id), states=("failed", "cancelled")
    )


def reevaluate(job: Job, limit: int | None, *, hub_token: str | None, settings: Settings, jobs: Jobs) -> Job:
    """Queue a finished job to evaluate more samples of its model, ``limit`` a task or as many as its gate needs.

    Raises RecipeError where more samples are of no use, and Conflict where the job has no finished model.
    """
    if job.state not in FINISHED or job.source is not None or job.cleaned:
        return jobs.reevaluate(job.id, limit or 1)  # raises Conflict with the reason
    asked = _samples(job, limit, settings=settings)
    return _queue_again(
        job, hub_token, settings=settings, jobs=jobs, queue=lambda: jobs.reevaluate(job.id, asked), states=FINISHED
    )


def can_reevaluate(job: Job, settings: Settings) -> bool:
    """Whether there are documents that the tasks of a finished job have not asked yet."""
    if job.state not in FINISHED or job.source is not None or job.cleaned:
        return False
    try:
        _samples(job, 2**31, settings=settings)
    except (RecipeError, Conflict):
        return False
    return True


def _samples(job: Job, limit: int | None, *, settings: Settings) -> int:
    try:
        report = json.loads((settings.run_folder(job.id) / "report.json").read_text(encoding="utf-8"))
        gate = GateFigures.model_validate(report["gate"], strict=False) if report["gate"] else None
        documents = [task.get("documents") for task in report["tasks"]]
        had = report["recipe"]["evaluation"]["limit"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise Conflict(f"the report of job {job.id} cannot be read; submit its recipe as a new job") from error
    if not documents:
        raise RecipeError("the recipe names no tasks, so there are no samples to evaluate", "evaluation")
    try:
        return next_limit(gate, had, documents=documents, wanted=limit)
    except RecipeError as error:
        raise RecipeError([problem.replace("--limit", "limit") for problem in error.problems], "evaluation") from error


def _queue_again(
    job: Job,
    hub_token: str | None,
    *,
    settings: Settings,
    jobs: Jobs,
    queue: Callable[[], Job],
    states: Sequence[State],
) -> Job:
    """Queue a job that is in one of the states, with its new hub token there before the supervisor looks."""
    folder = settings.folder(job.id)
    given = hub_token if job.state in states else None
    if given:
        keep_token(folder, given)
    try:
        return queue()
    except Conflict:
        now = jobs.get(job.id)
        if given and now is not None and now.ended:  # else somebody else's retry was faster, and needs it
            drop_token(folder, settings.log(job.id))
        raise


def cancel(job: Job, settings: Settings, *, jobs: Jobs) -> Job:
    """Cancel a job; one that has not started is through with its token. Raises Conflict."""
    cancelled = jobs.cancel(job.id)
    if cancelled.ended:
        drop_token(settings.folder(job.id), settings.log(job.id))
    return cancelled


def _require_token(hub_token: str | None) -> None:
    if not hub_token:
        raise RecipeError("X-Hub-Token: a push needs a hub token of its own, which may write to the repository", "push")


def _add(settings: Settings, hub_token: str | None, *, jobs: Jobs, new: NewJob) -> tuple[Job, bool]:
    """Queue a job under a new id; on failure nothing of it stays in the data folder."""
    job = secrets.token_hex(6)
    folder = settings.folder(job)
    is_new = False
    try:
        if hub_token:  # there before the job is: the supervisor may start it at once
            keep_token(folder, hub_token)
        queued, is_new = jobs.add(job, new, max_queued=settings.max_queued, max_jobs=settings.max_jobs)
        return queued, is_new
    finally:
        if not is_new:
            shutil.rmtree(folder, ignore_errors=True)


def _request(submission: Submission, recipe: Recipe, *, caller: Caller, settings: Settings) -> JobRequest:
    problems = []
    if submission.name and (shown := printable(submission.name)) != submission.name:
        problems.append(
            f"name: {shown!r} has control, format or direction characters; give letters, digits, signs and spaces"
        )
    here = 0 if submission.launcher in settings.elsewhere else min(1, len(settings.gpus))
    gpus = submission.gpus if submission.gpus is not None else here
    if submission.launcher not in settings.launchers:
        problems.append(f"launcher: {submission.launcher!r} is not offered; choose {', '.join(settings.launchers)}")
    if submission.launcher == "local" and gpus > len(settings.gpus):
        problems.append(f"gpus: {gpus} asked and this machine has {len(settings.gpus)}; ask for fewer")
    elif submission.launcher == "torchrun" and gpus > len(settings.gpus):
        problems.append(f"gpus: {gpus} asked and each node has {len(settings.gpus)}; ask for fewer")
    if submission.priority > 0 and caller.role != "admin":
        problems.append("priority: only admins go before others; give 0 or less")
    limits = [limit for limit in (submission.time_limit, settings.time_limit) if limit is not None]
    if settings.time_limit is not None and (submission.time_limit or 0) > settings.time_limit:
        asked, limit = submission.time_limit or 0.0, settings.time_limit
        problems.append(f"time_limit: {asked:,.15g} s asked and the limit is {limit:,.15g} s; ask for less")
    if problems:
        raise RecipeError(problems, "submission")
    return JobRequest(
        name=submission.name or default_name(recipe),
        launcher=submission.launcher,
        gpus=gpus,
        priority=submission.priority,
        time_limit=min(limits, default=None),
        shared=submission.shared,
    )


def default_name(recipe: Recipe) -> str:
    """``SmolLM2-135M-Instruct −2 layers, 75% MLP``: what a person would call it."""
    model = short_model_name(recipe.model.id)
    cuts = []
    if recipe.depth:
        count = recipe.depth.remove or len(recipe.depth.layers or ())
        cuts.append(f"−{plural(count, 'layer')}" if count else plural(recipe.depth.keep or 0, "layer"))
    if recipe.width:
        cuts += _narrowed(recipe.width)
    if recipe.experts:
        count = recipe.experts.remove or 0
        cuts.append(f"−{plural(count, 'expert')}" if count else plural(recipe.experts.keep or 0, "expert"))
    if recipe.sparsity:
        cuts.append(f"{recipe.sparsity.parsed} sparse")
    return printable(f"{model} {', '.join(cuts)}".strip())[:120]


def _narrowed(width: Width) -> list[str]:
    """Name what a width section keeps: ``75% MLP``, ``1,152 neurons``, ``2 key-value heads``."""
    kept = []
    if width.mlp is not None:
        kept.append(f"{_share(width.mlp)} MLP")
    elif isinstance(width.neurons, int):
        kept.append(plural(width.neurons, "neuron"))
    elif width.neurons:
        kept.append("narrower MLP")
    if isinstance(width.heads, int):
        kept.append(plural(width.heads, "key-value head"))
    elif width.heads is not None:
        kept.append(f"{_share(width.heads)} heads")
    return kept


def _share(fraction: float) -> str:
    """``75%``, ``99.9%``: a fraction with its digits, so that none but the whole is 100 %."""
    return f"{fraction * 100:.6g}%"
