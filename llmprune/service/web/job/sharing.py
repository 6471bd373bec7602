"""The forms of a job's page that change who may read the job."""

from __future__ import annotations

from fastapi.responses import RedirectResponse, Response

from llmprune.service.api.dependencies import JobId, TheCaller, TheService
from llmprune.service.jobs.sharing import set_shared
from llmprune.service.web.responses import page_router

router = page_router()


@router.post("/jobs/{job}/share")
def share(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Let every user read the job and return to its page."""
    set_shared(service.database, service.own_job(job, caller).id, shared=True)
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/unshare")
def unshare(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Let only its owner and admins read the job and return to its page."""
    set_shared(service.database, service.own_job(job, caller).id, shared=False)
    return RedirectResponse(f"/jobs/{job}", 303)
