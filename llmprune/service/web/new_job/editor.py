"""The page for a new job: questions, the recipe in an editor, and checks of the recipe while it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from secrets import token_hex
from typing import Annotated, Any, Literal

from fastapi import Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from llmprune.common.errors import RecipeError
from llmprune.recipe.suites import suites
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.jobs.drafts import Draft, Drafts
from llmprune.service.jobs.follow_ups.recipes import editable_recipe
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.submission import Submission, submit
from llmprune.service.notifications.targets import split_lines
from llmprune.service.planner.queue import PlannerBusy
from llmprune.service.recipe_policy.allowed_paths import task_folders
from llmprune.service.recipe_policy.policy import examine
from llmprune.service.supervisor.launchers import offered_launchers
from llmprune.service.web.job.search import recipe_of_shape, search_of
from llmprune.service.web.new_job.drafts import save_draft, submission_of, unix_text
from llmprune.service.web.new_job.first_recipe import first_recipe
from llmprune.service.web.new_job.form import RecipeForm, apply_form, follows, form_of
from llmprune.service.web.new_job.problem_lines import with_lines
from llmprune.service.web.new_job.repairs import REPAIRS
from llmprune.service.web.new_job.times import time_values
from llmprune.service.web.new_job.uses import USES
from llmprune.service.web.responses import page, page_router, plain_token

router = page_router()


@router.get("/submit")
async def submit_page(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    again: Annotated[str | None, Query(max_length=12)] = None,
    shape: Annotated[str | None, Query(max_length=200)] = None,
    size: Annotated[int, Query(ge=0, le=1000)] = 0,
    sent: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """Show the questions and the editor, with the caller's draft if there is one.

    ``again`` is a job whose recipe to start with; ``shape``, one that its search tried for the budget ``size``, takes
    the place of its budget. ``sent`` is the key with which this page was submitted before.
    """

    def open_editor() -> Response:
        drafts = Drafts(service.database)
        job = again or (drafts.submitted_as(caller.name, sent) if sent else None)
        draft = drafts.get(caller.name)
        if job is None:
            shown = submission_of(draft) if draft else Submission(first_recipe(service.settings))
            return _editor(request, service, submission=shown, draft=draft)
        found = service.job(job, caller)
        recipe = editable_recipe(found) if shape is None else _of_shape(service, found, shape=shape, size=size)
        return _editor(request, service, submission=Submission(recipe), draft=draft, is_restored=False)

    return await service.recipe_queue.run(caller.name, open_editor)


@router.post("/submit")
async def submit_recipe(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    recipe: Annotated[str, Form()] = "",
    name: Annotated[str, Form(max_length=120)] = "",
    launcher: Annotated[str, Form(max_length=20)] = "local",
    gpus: Annotated[str, Form(pattern=r"^\d{0,4}$")] = "",
    priority: Annotated[str, Form(pattern=r"^-?\d{0,3}$")] = "",
    minutes: Annotated[str, Form(pattern=r"^\d{0,6}$")] = "",
    hub_token: Annotated[str, Form(max_length=500)] = "",
    shared: Annotated[Literal["on", ""], Form()] = "",
    notify_url: Annotated[str, Form(max_length=12_000)] = "",
    notify_email: Annotated[str, Form(max_length=2_000)] = "",
    key: Annotated[str, Form(max_length=100)] = "",
) -> Response:
    """Queue the recipe in the editor, once however often the button is pressed, or show its problems."""
    settings = {"name": name, "launcher": launcher, "gpus": gpus, "priority": priority, "minutes": minutes}
    submission = replace(
        submission_of(Draft(unix_text(recipe), settings | {"shared": shared})),
        key=key or None,
        hub_token=plain_token(hub_token),
        notify_urls=split_lines(notify_url),
        notify_emails=split_lines(notify_email),
    )

    def queue() -> Response:
        try:
            job, _ = submit(submission, caller, settings=service.settings, jobs=service.jobs)
        except RecipeError as error:
            return refused(error.problems, 422)
        except Conflict as error:  # the browser's Back button sent the key again with another recipe
            return refused([str(error)], 409)
        except QueueFull as error:
            return refused([str(error)], 429)
        service.wake()
        Drafts(service.database).discard(caller.name)
        return RedirectResponse(f"/jobs/{job.id}", 303)

    def refused(problems: Sequence[str], status: int) -> Response:
        save_draft(service, caller, submission=submission)
        return _editor(request, service, submission=submission, problems=problems, status=status)

    return await service.recipe_queue.run(caller.name, queue)


@router.post("/submit/compose")
async def compose(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Apply the answers of the form to the recipe in the editor."""
    answers = {key: value for key, value in (await request.form()).items() if isinstance(value, str)}
    text = unix_text(answers.pop("recipe", ""))
    try:
        form = RecipeForm(**answers)
    except ValueError as error:
        raise Refused(422, "an answer is longer than 500 letters") from error

    def composed() -> Response:
        recipe = apply_form(text, form)
        changed = follows(recipe, form, before=form_of(text))
        values = _choices(service) if changed else {}
        answer = page(request, "composed", recipe=recipe, oob=True, form=changed, typed=True, **values)
        answer.headers["HX-Trigger"] = "composed"
        return answer

    return await service.recipe_queue.run(caller.name, composed)


@router.post("/submit/check")
async def check(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    recipe: Annotated[str, Form()] = "",
    typed: Annotated[bool, Query(description="The recipe was typed, so the form follows it.")] = False,
) -> Response:
    """Show the problems of the recipe's form; the page then asks for the plan of the valid part."""
    text = unix_text(recipe)

    def checked() -> Response:
        try:
            examined = examine(text, (), settings=service.settings, model_of=service.models(caller).folder)
            problems, rest = examined.problems, examined.recipe is not None
        except RecipeError as error:
            problems, rest = error.problems, False
        values: dict[str, Any] = {"form": form_of(text) if typed else None} | _choices(service)
        values["problems"] = with_lines(text, service.paths.hide_in(problems))
        return page(request, "check", rest=rest, typed=typed, **values)

    return await service.recipe_queue.run(caller.name, checked)


@router.post("/submit/plan")
async def plan(
    request: Request, service: TheService, *, caller: TheCaller, recipe: Annotated[str, Form()] = ""
) -> Response:
    """Show the plan of the recipe, or the problems that the plan adds to those of the check.

    While the planner is busy, the page asks again later.
    """
    text = unix_text(recipe)
    try:
        model_of = service.models(caller).folder
        examined = await service.recipe_queue.run(
            caller.name, examine, text, (), settings=service.settings, model_of=model_of
        )
        answer, listed = await run_in_threadpool(service.plan, examined, caller), bool(examined.problems)
    except RecipeError as error:
        answer, listed = {"problems": service.paths.hide_in(error.problems)}, False
    except PlannerBusy as busy:
        return await run_in_threadpool(page, request, "later", reason=str(busy), seconds=math.ceil(busy.wait))
    problems = await run_in_threadpool(with_lines, text, answer.get("problems", []))
    values: dict[str, Any] = {"plan": answer.get("plan"), "problems": problems, "listed": listed}
    values |= time_values(answer.get("plan"))
    return await run_in_threadpool(page, request, "plan", **values)


def _editor(
    request: Request,
    service: Service,
    *,
    submission: Submission,
    draft: Draft | None = None,
    is_restored: bool = True,
    problems: Sequence[str] = (),
    status: int = 200,
) -> Response:
    """Show the page. ``draft``: what the user has; ``is_restored``: the page shows it."""
    settings = service.settings
    values = {
        "submission": submission,
        "form": form_of(submission.recipe),
        "recipe": submission.recipe,
        "problems": with_lines(submission.recipe, service.paths.hide_in(list(problems))),
        "launchers": list(offered_launchers(settings)),
        "gpus": len(settings.gpus),
        "everybody": settings.share_jobs,
        "key": token_hex(16),
        "mail": settings.notifications.smtp is not None,
        "webhooks": settings.notifications.webhooks != "off",
        "typed": False,
        "draft": draft,
        "is_restored": is_restored,
    }
    return page(request, "submit", status=status, **values | _choices(service))


def _choices(service: Service) -> dict[str, Any]:
    """Return what the questions offer."""
    return {"folders": task_folders(service.settings), "uses": USES, "repairs": REPAIRS, "suites": list(suites())}


def _of_shape(service: Service, job: Job, *, shape: str, size: int) -> str:
    """Return a job's recipe with a shape that its search tried. Raises Refused (404)."""
    search = search_of(service, job.id)
    recipe = None if search is None else recipe_of_shape(editable_recipe(job), search.figures, name=shape, size=size)
    if recipe is None:
        raise Refused(404, f"job {job.id} has not tried the shape {shape!r}")
    return recipe
