"""The form that pushes a finished job's model to the hub."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from llmprune.recipe.hub import Hub
from llmprune.recipe.recipe import validate_arguments
from llmprune.service.api.dependencies import JobId, TheCaller, TheService
from llmprune.service.jobs.submission import submit_push
from llmprune.service.web.form_body import FormRoute
from llmprune.service.web.pages import plain_token

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse, route_class=FormRoute)


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
) -> Response:
    """Queue the push, and show it."""
    wishes = {"repo_id": repo_id.strip(), "private": visibility == "private", "create_pr": bool(create_pr)}
    hub = validate_arguments(Hub, wishes | {"when": "always" if always else "gate_passed"})
    token = plain_token(hub_token) if hub_token else None
    source = service.own_job(job, caller)
    found, _ = submit_push(source, hub, hub_token=token, caller=caller, settings=service.settings, jobs=service.jobs)
    service.nudge()
    return RedirectResponse(f"/jobs/{found.id}", 303)
