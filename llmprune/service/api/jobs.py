"""Jobs: submit, look, change."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from llmprune.recipe.hub import Hub
from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.api.recipes import RECIPE_BODY, Overrides, RecipeText
from llmprune.service.jobs.job import Figures, Job, JobSummary, State
from llmprune.service.jobs.submission import Submission, cancel, reevaluate, retry, submit, submit_push

router = APIRouter(prefix="/v1", tags=["jobs"])

_PUSH_LIMIT = 8 * 1024  # bytes: the framework reads this body on the event loop
_KEY = "Makes it safe to send a submission again: the same key and content give the same job."
_HUB_TOKEN = "A hub token for this job alone; it is deleted when the job ends."
HubToken = Annotated[
    str | None, Header(alias="X-Hub-Token", max_length=500, pattern=r"^[!-~]+$", description=_HUB_TOKEN)
]
PushToken = Annotated[
    str,
    Header(alias="X-Hub-Token", max_length=500, pattern=r"^[!-~]+$", description="A hub token for this push alone."),
]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200, description=_KEY)]
SeqNumber = Annotated[int | None, Query(ge=0, le=2**62, description="Jobs before this place: next of the last page.")]


class PushSettings(Hub, defer_build=False):  # FastAPI wants to know its fields at once
    """What a recipe's hub section says."""


class JobPage(BaseModel):
    """Some jobs, the newest first."""

    jobs: list[JobSummary]
    next: int | None = Field(description="Give it as before for the next page; null: this is the last.")
    counts: dict[State, int] = Field(description="All jobs that the caller may read, by state.")


class Compared(BaseModel):
    """One job of a comparison."""

    id: str
    name: str
    model: str
    state: State
    figures: Figures | None = Field(description="null: the job has no report.")


@router.post("/jobs", status_code=201, openapi_extra=RECIPE_BODY, responses=documented(404, 409, 413, 415, 422, 507))
async def submit_job(
    text: RecipeText,
    overrides: Overrides,
    *,
    service: TheService,
    caller: TheCaller,
    response: Response,
    name: Annotated[str | None, Query(min_length=1, max_length=120, description="For people.")] = None,
    launcher: Annotated[
        str, Query(max_length=20, description="local, torchrun or, where it is offered, ray.")
    ] = "local",
    gpus: Annotated[
        int | None, Query(ge=0, le=1024, description="Default: 1 where the service has one; on ray none.")
    ] = None,
    priority: Annotated[int, Query(ge=-100, le=100, description="Higher goes first; above 0: admins only.")] = 0,
    time_limit: Annotated[
        float | None, Query(gt=0, le=1e9, allow_inf_nan=False, description="Seconds that it may run.")
    ] = None,
    shared: Annotated[bool, Query(description="Let everybody with a token read it.")] = False,
    key: IdempotencyKey = None,
    hub_token: HubToken = None,
) -> Job:
    """Queue a recipe as a job."""
    wishes = Submission(text, overrides, name, launcher, gpus, priority, time_limit, key, hub_token, shared)
    job, new = await service.turns.run(
        caller.name, submit, wishes, caller, settings=service.settings, jobs=service.jobs
    )
    return await run_in_threadpool(_queued, job, new, service=service, response=response)


@router.get("/jobs", responses=documented(422))
def list_jobs(
    service: TheService,
    caller: TheCaller,
    *,
    state: Annotated[list[State], Query(default_factory=list, max_length=8, description="May be repeated.")],
    owner: Annotated[str | None, Query(max_length=64)] = None,
    search: Annotated[str | None, Query(max_length=200, description="Part of the name or model.")] = None,
    source: Annotated[str | None, Query(max_length=12, description="Only pushes of this job's model.")] = None,
    before: SeqNumber = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> JobPage:
    """List the jobs that the caller may read, the newest first."""
    viewer = service.viewer(caller)
    jobs, after = service.jobs.page(
        state, owner, search=search, before=before, limit=limit, source=source, viewer=viewer
    )
    return JobPage(jobs=[service.shown(job) for job in jobs], next=after, counts=service.jobs.counts(viewer=viewer))


@router.get("/jobs/{job}", responses=documented(404, 422))
def show_job(job: JobId, service: TheService, *, caller: TheCaller) -> Job:
    """Show a job with its recipe."""
    return service.shown(service.job(job, caller))


@router.post("/jobs/{job}/cancel", responses=documented(404, 409, 422, 507))
def cancel_job(job: JobId, service: TheService, *, caller: TheCaller) -> Job:
    """End a job: SIGTERM, then SIGKILL. What is done is kept for a retry."""
    cancelled = cancel(service.own_job(job, caller), service.settings, jobs=service.jobs)
    service.nudge()
    return service.shown(cancelled)


@router.post(
    "/jobs/{job}/push", status_code=201, responses=documented(404, 409, 413, 422, 507), max_body_size=_PUSH_LIMIT
)
def push_job(
    job: JobId,
    hub: PushSettings,
    *,
    service: TheService,
    caller: TheCaller,
    response: Response,
    hub_token: PushToken,
    key: IdempotencyKey = None,
) -> Job:
    """Push a finished job's model to the hub, as a job of its own: it can be watched, cancelled and tried again."""
    source = service.own_job(job, caller)
    push, new = submit_push(
        source, hub, hub_token=hub_token, caller=caller, settings=service.settings, jobs=service.jobs, key=key
    )
    return _queued(push, new, service=service, response=response)


@router.post("/jobs/{job}/retry", responses=documented(404, 409, 422, 507))
def retry_job(job: JobId, service: TheService, *, caller: TheCaller, hub_token: HubToken = None) -> Job:
    """Queue a failed or cancelled job again; it continues after the last layer. A push needs its token anew.

    It helps where the job was stopped or failed by a fault or a limit. A recipe that cannot be run (exit code 2) has to
    be corrected and submitted anew.
    """
    again = retry(service.own_job(job, caller), hub_token, settings=service.settings, jobs=service.jobs)
    service.nudge()
    return service.shown(again)


@router.post("/jobs/{job}/reevaluate", responses=documented(404, 409, 422, 507))
def reevaluate_job(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    limit: Annotated[
        int | None, Query(ge=1, le=10**9, description="Samples a task; default: as many as the gate needs.")
    ] = None,
    hub_token: HubToken = None,
) -> Job:
    """Evaluate more samples of a finished job's model: nothing is pruned again, earlier answers are kept.

    The job gets a new report and a new verdict. Until then it is queued or running; cancelled, it has its earlier
    verdict again.
    """
    again = reevaluate(
        service.own_job(job, caller), limit, hub_token=hub_token, settings=service.settings, jobs=service.jobs
    )
    service.nudge()
    return service.shown(again)


@router.delete("/jobs/{job}", status_code=204, responses=documented(404, 409, 422, 507))
def delete_job(job: JobId, service: TheService, *, caller: TheCaller) -> None:
    """Forget an ended job and remove all its files."""
    service.own_job(job, caller)
    service.jobs.delete(job)
    shutil.rmtree(service.settings.folder(job), ignore_errors=True)


@router.get("/compare", responses=documented(404, 422))
def compare_jobs(
    service: TheService,
    caller: TheCaller,
    *,
    job: Annotated[list[str], Query(min_length=1, max_length=50, description="Ids of jobs.")],
) -> list[Compared]:
    """The figures of several jobs side by side."""
    found = [service.job(one, caller) for one in dict.fromkeys(job)]
    return [Compared(**one.model_dump(include=set(Compared.model_fields))) for one in found]


def _queued(job: Job, new: bool, *, service: Service, response: Response) -> Job:
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not new:
        response.headers["Idempotent-Replay"] = "true"
    service.nudge()
    return service.shown(job)
