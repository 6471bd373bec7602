"""Submissions: the recipe is checked against the policy, the other settings against what the service offers.

The push of a finished job's model is submitted too. It needs a hub token of its own: with the service's token every
user could push in the operator's name, and a token sent with the recipe would be stored while the job waits and runs.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.recipe.hub import Hub
from llmprune.recipe.recipe import Recipe, refuse_tokens
from llmprune.results.formatting import plural
from llmprune.service.artifacts.parts import Use
from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.jobs.hub_token import drop_token, keep_token
from llmprune.service.jobs.job import Job, JobRequest, NewJob, State
from llmprune.service.jobs.job_name import default_name
from llmprune.service.jobs.launcher_checks import NO_TOKEN, has_data_folder, launcher_problems
from llmprune.service.jobs.library.job_models import JobModels
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.sweeps.shared_scores import key_of_scores
from llmprune.service.notifications.cipher import TargetCipher
from llmprune.service.notifications.targets import StoredTarget, checked_targets
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers import offered_launchers
from llmprune.service.users.quotas import default_quotas
from llmprune.service.users.tokens import Caller


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """Settings of a new job; the service chooses those that are None. ``key``: of a request that may be repeated."""

    name: str | None = None
    launcher: str = "local"
    gpus: int | None = None
    priority: int = 0
    time_limit: float | None = None
    key: str | None = None
    hub_token: str | None = None
    shared: bool = False

    @property
    def hashed(self) -> tuple[str | float | None, ...]:
        """Settings that an idempotency key stands for: all but the hub token."""
        return self.name, self.launcher, self.gpus, self.priority, self.time_limit, self.shared


@dataclass(frozen=True)
class Submission(QueueSettings):
    """A recipe to run, and its settings."""

    recipe: str
    overrides: Sequence[str] = ()
    notify_urls: Sequence[str] = ()
    notify_emails: Sequence[str] = ()

    def digest(self) -> str:
        """Return a digest of everything that an idempotency key stands for, which excludes the hub token."""
        targets = list(self.notify_urls), list(self.notify_emails)
        content = (self.recipe, list(self.overrides), *self.hashed, *targets)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class PushSubmission:
    """A finished job whose model is to be pushed, and the settings of the push."""

    source: Job
    hub: Hub
    hub_token: str | None
    key: str | None = None

    def digest(self) -> str:
        """Return a digest of everything that an idempotency key stands for, which excludes the hub token."""
        return hashlib.sha256(json.dumps([self.source.id, self.hub.model_dump_json()]).encode()).hexdigest()


def submit(submission: Submission, caller: Caller, *, settings: Settings, jobs: JobStore) -> tuple[Job, bool]:
    """Queue a job; return it, and whether it is new. Raises RecipeError, Conflict and QueueFull."""
    new = new_job(submission, caller, settings=settings, jobs=jobs)
    return queue_new(settings, submission.hub_token, jobs=jobs, new=new)


def new_job(submission: Submission, caller: Caller, *, settings: Settings, jobs: JobStore) -> NewJob:
    """Check a submission and return the job to be queued. Raises RecipeError."""
    models = JobModels(jobs, settings, caller)
    admitted = admit(submission.recipe, submission.overrides, settings=settings, model_of=models.folder)
    base = models.base_of(admitted.recipe.model.id)
    return NewJob(
        owner=caller.name,
        model=admitted.recipe.model.id,
        recipe=submission.recipe,
        overrides=admitted.overrides,
        request=job_request(submission, admitted.recipe, caller=caller, settings=settings, jobs=jobs, base=base),
        key=submission.key,
        digest=submission.digest(),
        notify=_targets(submission, settings),
        uses=(Use(base.id, "model"),) if base else (),
        scores=key_of_scores(admitted.recipe),
    )


def submit_push(push: PushSubmission, caller: Caller, *, settings: Settings, jobs: JobStore) -> tuple[Job, bool]:
    """Queue a push; return its job, and whether it is new. Raises RecipeError, Conflict and QueueFull."""
    source, hub = push.source, push.hub
    _require_token(push.hub_token)
    refuse_tokens(hub.model_dump_json(), (), source="push")
    request = JobRequest(
        name=f"push to {hub.repo_id}"[:120], time_limit=settings.time_limit, source=source.id, push=hub
    )
    new = NewJob(
        owner=caller.name,
        model=source.model,
        recipe=source.recipe,
        overrides=source.overrides,
        request=request,
        key=push.key,
        digest=push.digest(),
        uses=(Use(source.id, "run"),),
    )
    return queue_new(settings, push.hub_token, jobs=jobs, new=new)


def retry(job: Job, hub_token: str | None, *, settings: Settings, jobs: JobStore) -> Job:
    """Queue an ended job again, with a new hub token if one is given. Raises RecipeError, Conflict and QueueFull."""
    if job.source is not None:
        _require_token(hub_token)
    quotas = default_quotas(settings)
    return queue_again(
        job,
        hub_token,
        settings=settings,
        jobs=jobs,
        queue=lambda: jobs.retry(job.id, quotas=quotas),
        states=("failed", "cancelled"),
    )


def queue_again(
    job: Job,
    hub_token: str | None,
    *,
    settings: Settings,
    jobs: JobStore,
    queue: Callable[[], Job],
    states: Sequence[State],
) -> Job:
    """Queue a job that is in one of the states. Its new hub token is stored first, for it may start at once."""
    if hub_token and not has_data_folder(job.launcher, settings):
        raise RecipeError(NO_TOKEN, "submission")
    folder = settings.folder(job.id)
    new_token = hub_token if job.state in states else None
    if new_token:
        keep_token(folder, new_token)
    try:
        return queue()
    except (Conflict, QueueFull):
        now = jobs.get(job.id)
        if new_token and now is not None and now.ended:  # otherwise another retry came first, and needs the token
            drop_token(folder, settings.log(job.id))
        raise


def cancel(job: Job, settings: Settings, *, jobs: JobStore) -> Job:
    """Cancel a job; the token of one that has not started is deleted. Raises Conflict."""
    cancelled = jobs.cancel(job.id)
    if cancelled.ended:
        drop_token(settings.folder(job.id), settings.log(job.id))
    return cancelled


def _targets(submission: Submission, settings: Settings) -> tuple[StoredTarget, ...] | None:
    """Return the targets of a submission, encrypted; None where it names none. Raises RecipeError."""
    urls, emails = submission.notify_urls, submission.notify_emails
    targets = checked_targets(urls, emails, settings=settings.notifications)
    return tuple(map(TargetCipher(settings.data_dir).encrypt, targets)) or None


def _require_token(hub_token: str | None) -> None:
    if not hub_token:
        raise RecipeError("X-Hub-Token: a push needs a hub token of its own, which may write to the repository", "push")


def queue_new(settings: Settings, hub_token: str | None, *, jobs: JobStore, new: NewJob) -> tuple[Job, bool]:
    """Queue a job under a new id; on failure its folder is removed."""
    job = secrets.token_hex(6)
    folder = settings.folder(job)
    is_new = False
    try:
        if hub_token:  # stored before the job is queued: the supervisor may start it at once
            keep_token(folder, hub_token)
        queued, is_new = jobs.add(job, new, quotas=default_quotas(settings))
        return queued, is_new
    finally:
        if not is_new and not _may_exist(job, jobs):
            shutil.rmtree(folder, ignore_errors=True)


def _may_exist(job: str, jobs: JobStore) -> bool:
    """Return whether a job may be in the table: an answer of the database that is lost may have said that it is."""
    try:
        return jobs.get(job) is not None
    except DatabaseUnavailable:
        return True


def job_request(
    submission: Submission, recipe: Recipe, *, caller: Caller, settings: Settings, jobs: JobStore, base: Job | None
) -> JobRequest:
    """Check the settings of a submission and fill in the defaults. Raises RecipeError that lists every problem."""
    offered = offered_launchers(settings)
    launcher = offered.get(submission.launcher)
    is_remote = launcher is not None and not launcher.on_this_machine
    default_gpus = 0 if is_remote else min(1, len(settings.gpus))
    gpus = submission.gpus if submission.gpus is not None else default_gpus
    problems = []
    if submission.name and (shown := printable(submission.name)) != submission.name:
        problems.append(
            f"name: {shown!r} has control, format or direction characters; give letters, digits, signs and spaces"
        )
    if launcher is None:
        problems.append(f"launcher: {submission.launcher!r} is not offered; choose {', '.join(offered)}")
    else:
        has_token = bool(submission.hub_token)
        problems += launcher_problems(submission.launcher, gpus, has_token=has_token, settings=settings, jobs=jobs)
    named = recipe.devices
    needed = 0 if named == "all" else named if isinstance(named, int) else max(named) + 1
    if needed > gpus:
        problems.append(
            f"devices: needs {plural(needed, 'GPU')} and the job has {gpus}; leave devices out or raise gpus"
        )
    if submission.priority > 0 and caller.role != "admin":
        problems.append("priority: only admins may give more than 0; give 0 or less")
    limits = [limit for limit in (submission.time_limit, settings.time_limit) if limit is not None]
    if settings.time_limit is not None and (submission.time_limit or 0) > settings.time_limit:
        asked, limit = submission.time_limit or 0.0, settings.time_limit
        problems.append(f"time_limit: {asked:,.15g} s asked and the limit is {limit:,.15g} s; ask for less")
    if problems:
        raise RecipeError(problems, "submission")
    return JobRequest(
        name=submission.name or default_name(recipe, base.name if base else None),
        launcher=submission.launcher,
        gpus=gpus,
        priority=submission.priority,
        time_limit=min(limits, default=None),
        shared=submission.shared,
    )
