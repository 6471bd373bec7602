"""Routes of follow-ups: what can be asked next of a finished job, what was asked, and a new one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.api.jobs.jobs import HubToken, IdempotencyKey, queued_job
from llmprune.service.api.values import FollowUps, Offered
from llmprune.service.jobs.follow_ups.follow_ups import FollowUp, offers_of, submit_follow_up
from llmprune.service.jobs.follow_ups.work import Work
from llmprune.service.jobs.job import Job, JobQuery
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1/jobs/{job}/follow-ups", tags=["follow-ups"])

_BODY_LIMIT = 16 * 1024  # bytes; FastAPI reads this body on the event loop
MOST_SHOWN = 100


class FollowUpSettings(BaseModel):
    """A kind of work on a finished job, and the settings of the new job."""

    model_config = ConfigDict(extra="forbid")

    work: Work = Field(description="What to do, and its own settings.")
    name: str | None = Field(None, min_length=1, max_length=120, description="Name for people; default: made here.")
    launcher: str = Field("local", max_length=20, description="As in POST /v1/jobs.")
    gpus: int | None = Field(None, ge=0, le=1024, description="As in POST /v1/jobs.")
    priority: int = Field(0, ge=-100, le=100, description="As in POST /v1/jobs.")
    time_limit: float | None = Field(
        None, gt=0, le=1e9, allow_inf_nan=False, description="Maximum run time in seconds."
    )
    shared: bool = Field(False, description="Every user with a token may read it.")


@router.get("", responses=documented(404, 422))
async def list_follow_ups(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=500, description="Maximum number of jobs.")] = MOST_SHOWN,
) -> FollowUps:
    """Say which follow-ups a job can have, and list those that were made."""

    def found() -> FollowUps:
        return follow_ups_of(service, job, caller=caller, limit=limit)

    return await service.recipe_queue.run(caller.name, found)


def follow_ups_of(service: Service, job: str, *, caller: Caller, limit: int = MOST_SHOWN) -> FollowUps:
    """Return offers and follow-ups of a job. Raises Refused (404)."""
    found = service.job(job, caller)
    offers = service.paths.hide_in([[one.kind, one.reason] for one in offers_of(found, service.settings)])
    made = service.jobs.page(JobQuery(service.viewer(caller), made_from=job, limit=limit)).jobs
    return FollowUps(
        offers=[Offered(kind=kind, reason=reason) for kind, reason in offers],
        jobs=[service.shown(one) for one in made],
    )


@router.post("", status_code=201, responses=documented(404, 409, 413, 422, 507), max_body_size=_BODY_LIMIT)
async def make_follow_up(
    job: JobId,
    asked: FollowUpSettings,
    *,
    service: TheService,
    caller: TheCaller,
    response: Response,
    key: IdempotencyKey = None,
    hub_token: HubToken = None,
) -> Job:
    """Queue work on a finished job as a job of its own, which reuses what the finished one has.

    Whoever may read the finished job may ask. Its files cannot be deleted while the new job waits and runs.
    """

    def submit() -> tuple[Job, bool]:
        settings = {name: getattr(asked, name) for name in FollowUpSettings.model_fields}
        wanted = FollowUp(service.job(job, caller), **settings, key=key, hub_token=hub_token)
        return submit_follow_up(wanted, caller, settings=service.settings, jobs=service.jobs)

    made, new = await service.recipe_queue.run(caller.name, submit)
    return await run_in_threadpool(queued_job, made, new, service=service, response=response)
