"""The forms of a job's page: cancel, retry, evaluate more samples, push, delete."""

from __future__ import annotations

import shutil
from typing import Annotated, Literal

from fastapi import Form
from fastapi.responses import RedirectResponse, Response

from llmprune.recipe.hub import AUTO, Hub
from llmprune.recipe.recipe import validate_arguments
from llmprune.service.api.dependencies import JobId, TheCaller, TheService
from llmprune.service.jobs import submission
from llmprune.service.jobs.follow_ups import reevaluation
from llmprune.service.jobs.submission import PushSubmission
from llmprune.service.web.responses import page_router, plain_token

router = page_router()


@router.post("/jobs/{job}/cancel")
def cancel(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Cancel the job and return to its page."""
    submission.cancel(service.own_job(job, caller), service.settings, jobs=service.jobs)
    service.wake()
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/retry")
def retry(
    job: JobId, service: TheService, *, caller: TheCaller, hub_token: Annotated[str, Form(max_length=500)] = ""
) -> Response:
    """Queue an ended job again and return to its page."""
    token = plain_token(hub_token)
    submission.retry(service.own_job(job, caller), token, settings=service.settings, jobs=service.jobs)
    service.wake()
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/reevaluate")
def reevaluate(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    limit: Annotated[str, Form(pattern=r"^\d{0,9}$")] = "",
) -> Response:
    """Queue the evaluation of more samples and return to the job's page."""
    found, samples = service.own_job(job, caller), int(limit) if limit else None
    reevaluation.reevaluate(found, samples, hub_token=None, settings=service.settings, jobs=service.jobs)
    service.wake()
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/push")
def push(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    repo_id: Annotated[str, Form(max_length=200)] = "",
    hub_token: Annotated[str, Form(max_length=500)] = "",
    visibility: Annotated[Literal["private", "public"], Form()] = "private",
    always: Annotated[Literal["on", ""], Form()] = "",
    create_pr: Annotated[Literal["on", ""], Form()] = "",
    quantized: Annotated[Literal["on", ""], Form()] = "",
) -> Response:
    """Queue the push of the job's model and show the push."""
    settings: dict[str, object] = {"repo_id": repo_id.strip(), "private": visibility == "private"}
    settings |= {"create_pr": bool(create_pr), "when": "always" if always else "gate_passed"}
    settings |= {"quantized_repo_id": AUTO if quantized else None}
    hub = validate_arguments(Hub, settings)
    token = plain_token(hub_token)
    wanted = PushSubmission(service.own_job(job, caller), hub, token)
    queued, _ = submission.submit_push(wanted, caller, settings=service.settings, jobs=service.jobs)
    service.wake()
    return RedirectResponse(f"/jobs/{queued.id}", 303)


@router.post("/jobs/{job}/delete")
def delete(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Delete the job with its files and show the list of jobs."""
    service.own_job(job, caller)
    service.jobs.delete(job)
    shutil.rmtree(service.settings.folder(job), ignore_errors=True)
    return RedirectResponse("/", 303)
