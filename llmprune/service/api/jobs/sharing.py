"""Routes that change who may read a job."""

from __future__ import annotations

from fastapi import APIRouter

from llmprune.service.api.dependencies import JobId, TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.sharing import set_shared

router = APIRouter(prefix="/v1", tags=["jobs"])


@router.post("/jobs/{job}/share", responses=documented(404, 422, 507))
def share_job(job: JobId, service: TheService, *, caller: TheCaller) -> Job:
    """Let every user read a job."""
    service.own_job(job, caller)
    return service.shown(set_shared(service.database, job, shared=True))


@router.post("/jobs/{job}/unshare", responses=documented(404, 422, 507))
def unshare_job(job: JobId, service: TheService, *, caller: TheCaller) -> Job:
    """Let only a job's owner and admins read it."""
    service.own_job(job, caller)
    return service.shown(set_shared(service.database, job, shared=False))
