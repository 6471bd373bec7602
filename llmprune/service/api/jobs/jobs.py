"""Routes of jobs: submit, list, show, cancel, retry, evaluate again, push, delete."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from starlette.concurrency import run_in_threadpool

from llmprune.recipe.hub import Hub
from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.api.jobs.recipes import RECIPE_BODY, Overrides, RecipeText
from llmprune.service.api.values import JobPage
from llmprune.service.jobs.follow_ups.reevaluation import reevaluate
from llmprune.service.jobs.job import Job, JobQuery, State
from llmprune.service.jobs.submission import PushSubmission, Submission, cancel, retry, submit, submit_push
from llmprune.service.supervisor.launchers import LAUNCHERS

router = APIRouter(prefix="/v1", tags=["jobs"])

_PUSH_LIMIT = 8 * 1024  # bytes; FastAPI reads this body on the event loop
_KEY = "Makes a submission safe to repeat: the same key and content give the same job."
_HUB_TOKEN = "Hub token for this job alone; it is deleted when the job ends."
_LAUNCHERS = f"One of {', '.join(LAUNCHERS)}; GET /v1/queue lists those that this service offers."
HubToken = Annotated[
    str | None, Header(alias="X-Hub-Token", max_length=500, pattern=r"^[!-~]+$", description=_HUB_TOKEN)
]
PushToken = Annotated[
    str,
    Header(alias="X-Hub-Token", max_length=500, pattern=r"^[!-~]+$", description="Hub token for this push alone."),
]
# Headers, because proxies log the parameters of an address, and the path of a webhook may be a secret.
_DEFAULTS = "Default: those of PUT /v1/notifications."
_NOTIFY_URL = f"Webhook that is called when the job ends; several are separated by spaces. {_DEFAULTS}"
_NOTIFY_EMAIL = f"Address that gets an e-mail when the job ends; several are separated by spaces. {_DEFAULTS}"
NotifyUrls = Annotated[Sequence[str], Header(alias="X-Notify-URL", max_length=5, description=_NOTIFY_URL)]
NotifyEmails = Annotated[Sequence[str], Header(alias="X-Notify-Email", max_length=5, description=_NOTIFY_EMAIL)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200, description=_KEY)]
SeqNumber = Annotated[int | None, Query(ge=0, le=2**62, description="The field next of the previous page.")]


class PushSettings(Hub, defer_build=False):  # FastAPI needs its fields at import
    """Settings of a push, as in the hub section of a recipe."""


@router.post("/jobs", status_code=201, openapi_extra=RECIPE_BODY, responses=documented(404, 409, 413, 415, 422, 507))
async def submit_job(
    text: RecipeText,
    overrides: Overrides,
    *,
    service: TheService,
    caller: TheCaller,
    response: Response,
    name: Annotated[
        str | None, Query(min_length=1, max_length=120, description="Name for people; default: made from the recipe.")
    ] = None,
    launcher: Annotated[str, Query(max_length=20, description=_LAUNCHERS)] = "local",
    gpus: Annotated[
        int | None,
        Query(
            ge=0, le=1024, description="Number of GPUs. Default: 1 where this machine has one; 0 on another machine."
        ),
    ] = None,
    priority: Annotated[
        int, Query(ge=-100, le=100, description="Jobs with a higher priority start first; above 0 for admins only.")
    ] = 0,
    time_limit: Annotated[
        float | None, Query(gt=0, le=1e9, allow_inf_nan=False, description="Maximum run time in seconds.")
    ] = None,
    shared: Annotated[bool, Query(description="Every user with a token may read it.")] = False,
    key: IdempotencyKey = None,
    hub_token: HubToken = None,
    notify_urls: NotifyUrls = (),
    notify_emails: NotifyEmails = (),
) -> Job:
    """Queue a recipe as a job."""
    submission = Submission(
        recipe=text,
        overrides=overrides,
        name=name,
        launcher=launcher,
        gpus=gpus,
        priority=priority,
        time_limit=time_limit,
        key=key,
        hub_token=hub_token,
        shared=shared,
        notify_urls=[url for one in notify_urls for url in one.split()],
        notify_emails=[email for one in notify_emails for email in one.split()],
    )
    job, new = await service.recipe_queue.run(
        caller.name, submit, submission, caller, settings=service.settings, jobs=service.jobs
    )
    return await run_in_threadpool(queued_job, job, new, service=service, response=response)


@router.get("/jobs", responses=documented(422))
def list_jobs(
    service: TheService,
    caller: TheCaller,
    *,
    state: Annotated[
        list[State], Query(default_factory=list, max_length=8, description="Only jobs in this state; may be repeated.")
    ],
    owner: Annotated[str | None, Query(max_length=64, description="Only jobs of this user.")] = None,
    search: Annotated[str | None, Query(max_length=200, description="Part of the name or model, or an id.")] = None,
    source: Annotated[str | None, Query(max_length=12, description="Only pushes of this job's model.")] = None,
    made_from: Annotated[str | None, Query(max_length=12, description="Only follow-ups of this job.")] = None,
    before: SeqNumber = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Maximum number of jobs on the page.")] = 50,
) -> JobPage:
    """List the jobs that the caller may read, the newest first."""
    query = JobQuery(
        viewer=service.viewer(caller),
        states=state,
        owner=owner,
        search=search,
        source=source,
        made_from=made_from,
        before=before,
        limit=limit,
    )
    page = service.jobs.page(query)
    counts = service.jobs.counts(viewer=query.viewer)
    return JobPage(jobs=[service.shown(job) for job in page.jobs], next=page.next, counts=counts)


@router.get("/jobs/{job}", responses=documented(404, 422))
def show_job(job: JobId, service: TheService, *, caller: TheCaller) -> Job:
    """Show a job with its recipe."""
    return service.shown(service.job(job, caller))


@router.post("/jobs/{job}/cancel", responses=documented(404, 409, 422, 507))
def cancel_job(job: JobId, service: TheService, *, caller: TheCaller) -> Job:
    """Cancel a job: SIGTERM, then SIGKILL. The finished part is kept for a retry."""
    cancelled = cancel(service.own_job(job, caller), service.settings, jobs=service.jobs)
    service.wake()
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
    """Push a finished job's model to the hub, as a job of its own that can be watched, cancelled and retried."""
    submission = PushSubmission(service.own_job(job, caller), hub, hub_token, key)
    push, new = submit_push(submission, caller, settings=service.settings, jobs=service.jobs)
    return queued_job(push, new, service=service, response=response)


@router.post("/jobs/{job}/retry", responses=documented(404, 409, 422, 507))
def retry_job(job: JobId, service: TheService, *, caller: TheCaller, hub_token: HubToken = None) -> Job:
    """Queue a failed or cancelled job again; it continues after the last finished layer. A push needs its token again.

    A retry helps where the job was cancelled, or failed because of a fault or a limit. A recipe that cannot be run
    (exit code 2) has to be corrected and submitted as a new job.
    """
    again = retry(service.own_job(job, caller), hub_token, settings=service.settings, jobs=service.jobs)
    service.wake()
    return service.shown(again)


@router.post("/jobs/{job}/reevaluate", responses=documented(404, 409, 422, 507))
def reevaluate_job(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    limit: Annotated[
        int | None, Query(ge=1, le=10**9, description="Samples for each task; default: as many as the gate needs.")
    ] = None,
    hub_token: HubToken = None,
) -> Job:
    """Evaluate a finished job's model on more samples. Nothing is pruned again, and earlier answers are kept.

    The job gets a new report and a new verdict. Until then it is queued or running; where it is cancelled, it gets its
    earlier verdict back.
    """
    again = reevaluate(
        service.own_job(job, caller), limit, hub_token=hub_token, settings=service.settings, jobs=service.jobs
    )
    service.wake()
    return service.shown(again)


@router.delete("/jobs/{job}", status_code=204, responses=documented(404, 409, 422, 507))
def delete_job(job: JobId, service: TheService, *, caller: TheCaller) -> None:
    """Delete an ended job with all its files."""
    service.own_job(job, caller)
    service.jobs.delete(job)
    shutil.rmtree(service.settings.folder(job), ignore_errors=True)


def queued_job(job: Job, new: bool, *, service: Service, response: Response) -> Job:
    """Wake the supervisor for a queued job and return it; the response says where it is, and whether it is new."""
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not new:
        response.headers["Idempotent-Replay"] = "true"
    service.wake()
    return service.shown(job)
