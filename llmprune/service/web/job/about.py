"""A job's place in the model library: its labels, and links to what it was made from and what was made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.results.formatting import plural
from llmprune.service.api.dependencies import Service
from llmprune.service.jobs.job import JOB_ID, Job, JobSummary
from llmprune.service.jobs.library.library import Library
from llmprune.service.jobs.library.models import HistoryEvent, Model, may_label
from llmprune.service.jobs.sweeps.axes import SweepSummary
from llmprune.service.jobs.sweeps.sweeps import sweep_of_job
from llmprune.service.recipe_policy.allowed_paths import JOB_SCHEME
from llmprune.service.users.tokens import Caller

_EVENTS = {
    "cleaned": "the clean-up deleted the model",
    "shared": "shared with every user, or made private",
    "owner": "given to another user",
}


@dataclass(frozen=True)
class About:
    """Values of a job's page besides those of the run itself."""

    model: Model | None  # None: the job has no result
    may_label: bool
    base: Job | None  # that made the model which this job pruned
    derived: Sequence[JobSummary]  # jobs that pruned its model; follow-ups have a list of their own
    sweep: SweepSummary | None
    history: Sequence[HistoryEvent]


def about_of(service: Service, caller: Caller, *, job: Job) -> About:
    """Return what the caller may know about a job."""
    library = Library(service.database)
    folder = service.settings.run_folder(job.id)
    shares = service.settings.share_jobs
    derived = library.jobs_of_models([f"{JOB_SCHEME}{job.id}", str(folder), str(folder / "model")])
    sweep = sweep_of_job(service.database, job.id)
    return About(
        model=library.get(job.id),
        may_label=may_label(caller, job.owner),
        base=_readable(_maker_of(job.model, service), service, caller=caller),
        derived=[one for one in derived if caller.may_read(one.owner, one.shared or shares)],
        sweep=sweep if sweep and caller.may_read(sweep.owner, sweep.shared or shares) else None,
        history=library.history(job.id),
    )


def describe_event(event: HistoryEvent) -> str:
    """Describe a change, such as ``ann: stage approved, tags added: best``."""
    changes, state = event.data.get("changes") or {}, str(event.data.get("state", "")).replace("_", " ")
    if event.kind == "uploaded":
        return f"uploaded by {event.data.get('by')}"
    if event.kind in _EVENTS:
        return _EVENTS[event.kind]
    if event.kind != "labels":
        attempts = event.data.get("attempts") or 0
        return state + (f", {plural(attempts, 'attempt')}" if state == "running" and attempts > 1 else "")
    parts = [f"stage {changes['stage']}"] if "stage" in changes else []
    parts += [f"tags {name}: {', '.join(changes[name])}" for name in ("added", "removed") if name in changes]
    parts += [f"notes {changes['notes']}"] if "notes" in changes else []
    return f"{event.data.get('by')}: {'; '.join(parts)}"


def _maker_of(model: str, service: Service) -> str | None:
    """Return the id of the job in whose run folder a model is."""
    folder = re.escape(str(service.settings.data_dir / "jobs"))
    found = re.fullmatch(rf"(?:{JOB_SCHEME}({JOB_ID})|{folder}/({JOB_ID})/run(?:/model)?/?)", model)
    return (found[1] or found[2]) if found else None


def _readable(job: str | None, service: Service, *, caller: Caller) -> Job | None:
    return service.find(job, caller) if job else None
