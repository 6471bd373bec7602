"""Follow-ups: jobs that begin from what a finished job has, so that nothing is made anew that need not be.

Whoever may read a job may ask for follow-ups of it, which belong to the one who asked. The recipe of a follow-up is
that of its parent with a few overrides, and passes the recipe policy like any other. Paths of the parent's folder are
no part of it: the supervisor adds them to the command (``supervisor/follow_up_commands.py``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from llmprune.common.errors import RecipeError
from llmprune.common.printing import printable
from llmprune.service.artifacts.parts import Use
from llmprune.service.jobs.follow_ups.recipes import overrides_of, recipe_of, sizes_of
from llmprune.service.jobs.follow_ups.work import Bench, Evaluate, Recover, Repeat, Size, Sparsify, Work
from llmprune.service.jobs.job import FINISHED, Job, NewJob
from llmprune.service.jobs.library.job_models import JobModels
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.submission import QueueSettings, Submission, job_request, queue_new
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.settings import Settings
from llmprune.service.users.tokens import Caller


@dataclass(frozen=True)
class FollowUp(QueueSettings):
    """Work on a finished job, and the settings of its job."""

    parent: Job
    work: Work

    def digest(self) -> str:
        """Return a digest of everything that an idempotency key stands for, which excludes the hub token."""
        return hashlib.sha256(
            json.dumps([self.parent.id, self.work.model_dump_json(), *self.hashed]).encode()
        ).hexdigest()


@dataclass(frozen=True)
class Offer:
    """A kind of follow-up that a job may have. ``reason``: why it cannot have one; None: it can."""

    kind: str
    reason: str | None = None


def submit_follow_up(asked: FollowUp, caller: Caller, *, settings: Settings, jobs: JobStore) -> tuple[Job, bool]:
    """Queue a follow-up; return its job, and whether it is new. Raises RecipeError, Conflict and QueueFull."""
    parent = asked.parent
    work, reads = _work_and_use(asked)
    if isinstance(work, Bench) and asked.launcher == "torchrun":
        raise RecipeError("launcher: a bench times both models in one process; choose local", "follow-up")
    overrides = overrides_of(parent, asked.work, settings=settings)
    models = JobModels(jobs, settings, caller)
    admitted = admit(parent.recipe, overrides, settings=settings, model_of=models.folder)
    base = models.base_of(admitted.recipe.model.id)
    submission = Submission(
        recipe=parent.recipe,
        name=asked.name or (None if isinstance(work, Size) else _name(parent, asked.work)),
        launcher=asked.launcher,
        gpus=asked.gpus,
        priority=asked.priority,
        time_limit=asked.time_limit,
        shared=asked.shared,
    )
    request = job_request(submission, admitted.recipe, caller=caller, settings=settings, jobs=jobs, base=base)
    new = NewJob(
        owner=caller.name,
        model=parent.model,
        recipe=parent.recipe,
        overrides=list(dict.fromkeys(reversed(admitted.overrides)))[::-1],  # the policy adds its own once more
        request=request.model_copy(update={"made_from": parent.id, "work": work}),
        key=asked.key,
        digest=asked.digest(),
        uses=(*reads, *([Use(base.id, "model")] if base else [])),
    )
    return queue_new(settings, asked.hub_token, jobs=jobs, new=new)


def _work_and_use(asked: FollowUp) -> tuple[Work, tuple[Use, ...]]:
    """Return the work of a follow-up, and the files of another job that it reads. Raises Conflict."""
    parent = asked.parent
    if not isinstance(asked.work, Repeat):
        require_model(parent, asked.work)
        return asked.work, _read(parent.id, asked.work)
    if parent.source is not None:
        raise Conflict(f"job {parent.id} is a push; push the model of job {parent.source} again")
    if parent.work is None or isinstance(parent.work, Size | Repeat):  # its recipe is all that it needs
        return asked.work, ()
    return parent.work, _read(parent.reads, parent.work)


def _read(job: str | None, work: Work) -> tuple[Use, ...]:
    return (Use(job, work.needs),) if job is not None and work.needs is not None else ()


def require_model(job: Job, work: Work) -> None:
    """Raise Conflict where a job has not what the work needs, before its report is read; see ``require_files``."""
    if job.source is not None:
        raise Conflict(f"job {job.id} is a push; ask for follow-ups of job {job.source}")
    if job.state not in FINISHED:
        raise Conflict(f"job {job.id} is {job.state.replace('_', ' ')}; only a finished job has follow-ups")
    if job.figures is None:
        raise Conflict(f"job {job.id} has made no model; ask for follow-ups of job {job.reads}")
    if job.uploaded:
        raise Conflict(f"job {job.id} was uploaded; work on its model where it was made")
    if job.cleaned and work.needs == "run":
        raise Conflict(f"the clean-up has deleted the model of job {job.id}; run its recipe again, then ask for this")


_ANY: tuple[Work, ...] = (
    Evaluate(tasks=("any",)),
    Bench(),
    Size(keep=0.5),
    Recover(tokens=1_000_000),
    Sparsify(),
    Repeat(),
)


def offers_of(job: Job, settings: Settings) -> list[Offer]:
    """Return every kind of follow-up, with the reason where a job cannot have one."""
    return [Offer(work.kind, _reason(job, work, settings=settings)) for work in _ANY]


def _reason(job: Job, work: Work, *, settings: Settings) -> str | None:
    try:
        if isinstance(work, Size):
            require_model(job, work)
            sizes_of(recipe_of(job))
            return None
        _work_and_use(FollowUp(job, work))
        overrides_of(job, work, settings=settings)
    except (Conflict, RecipeError) as error:
        return "; ".join(error.problems) if isinstance(error, RecipeError) else str(error)
    return None


def _name(parent: Job, work: Work) -> str:
    """Return a name such as ``Bench of SmolLM2-135M 75% parameters``."""
    more = f": {', '.join(work.tasks)}" if isinstance(work, Evaluate) and work.tasks else ""
    return printable(f"{work.title} of {parent.name}{more}")[:120]
