"""The page for a new job: a form, the recipe in an editor, and checks of the recipe while it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from secrets import token_hex
from typing import Annotated, Any, Literal

from fastapi import Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from llmprune.common.errors import RecipeError
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.jobs.follow_up_recipes import editable_recipe
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.submission import Submission, submit
from llmprune.service.planner.queue import PlannerBusy
from llmprune.service.recipe_policy.allowed_paths import task_folders
from llmprune.service.recipe_policy.policy import examine
from llmprune.service.supervisor.launchers import offered_launchers
from llmprune.service.web.form import START, RecipeForm, apply_form, form_of
from llmprune.service.web.responses import page, page_router, plain_token
from llmprune.service.web.search import recipe_of_shape, search_of

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
) -> Response:
    """Show the form and the editor.

    ``again`` is a job whose recipe to start with; ``shape``, one that its search tried for the budget ``size``, takes
    the place of its budget.
    """

    def open_editor() -> Response:
        found = service.job(again, caller) if again else None
        recipe = editable_recipe(found) if found else START
        if found and shape is not None:
            search = search_of(service, found.id)
            of_shape = None if search is None else recipe_of_shape(recipe, search.figures, name=shape, size=size)
            if of_shape is None:
                raise Refused(404, f"job {again} has not tried the shape {shape!r}")
            recipe = of_shape
        return _editor(request, service, submission=Submission(recipe))

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
    key: Annotated[str, Form(max_length=100)] = "",
) -> Response:
    """Queue the recipe in the editor, once however often the button is pressed, or show its problems."""
    submission = Submission(
        _unix(recipe),
        name=name.strip() or None,
        launcher=launcher,
        gpus=int(gpus) if gpus else None,
        priority=max(-100, min(100, int(priority or 0))) if priority != "-" else 0,
        time_limit=60.0 * int(minutes) if minutes and int(minutes) else None,
        key=key or None,
        hub_token=plain_token(hub_token),
        shared=bool(shared),
    )

    def queue() -> Response:
        try:
            job, _ = submit(submission, caller, settings=service.settings, jobs=service.jobs)
        except RecipeError as error:
            return _editor(request, service, submission=submission, problems=error.problems, status=422)
        except Conflict as error:  # the browser's Back button sent the key again with another recipe
            return _editor(request, service, submission=submission, problems=[str(error)], status=409)
        except QueueFull as error:
            return _editor(request, service, submission=submission, problems=[str(error)], status=429)
        service.wake()
        return RedirectResponse(f"/jobs/{job.id}", 303)

    return await service.recipe_queue.run(caller.name, queue)


@router.post("/submit/compose")
async def compose(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Apply the answers of the form to the recipe in the editor."""
    answers = {key: value for key, value in (await request.form()).items() if isinstance(value, str)}
    text = _unix(answers.pop("recipe", ""))
    try:
        form = RecipeForm(**answers)
    except ValueError as error:
        raise Refused(422, "an answer is longer than 500 letters") from error

    def composed() -> Response:
        return page(request, "composed", recipe=apply_form(text, form), oob=True)

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
    text = _unix(recipe)

    def checked() -> Response:
        try:
            examined = examine(text, (), settings=service.settings)
            problems, rest = examined.problems, examined.recipe is not None
        except RecipeError as error:
            problems, rest = error.problems, False
        values: dict[str, Any] = {"form": form_of(text) if typed else None, "folders": task_folders(service.settings)}
        problems = service.paths.hide_in(problems)
        return page(request, "check", problems=problems, rest=rest, typed=typed, **values)

    return await service.recipe_queue.run(caller.name, checked)


@router.post("/submit/plan")
async def plan(
    request: Request, service: TheService, *, caller: TheCaller, recipe: Annotated[str, Form()] = ""
) -> Response:
    """Show the plan of the recipe, or the problems that the plan adds to those of the check.

    While the planner is busy, the page asks again later.
    """
    text = _unix(recipe)
    try:
        examined = await service.recipe_queue.run(caller.name, examine, text, (), settings=service.settings)
        answer, listed = await run_in_threadpool(service.plan, examined, caller), bool(examined.problems)
    except RecipeError as error:
        answer, listed = {"problems": service.paths.hide_in(error.problems)}, False
    except PlannerBusy as busy:
        return await run_in_threadpool(page, request, "later", reason=str(busy), seconds=math.ceil(busy.wait))
    values = {"plan": answer.get("plan"), "problems": answer.get("problems", []), "listed": listed}
    return await run_in_threadpool(page, request, "plan", **values)


def _editor(
    request: Request, service: Service, *, submission: Submission, problems: Sequence[str] = (), status: int = 200
) -> Response:
    settings = service.settings
    values = {
        "submission": submission,
        "form": form_of(submission.recipe),
        "recipe": submission.recipe,
        "problems": service.paths.hide_in(list(problems)),
        "launchers": list(offered_launchers(settings)),
        "gpus": len(settings.gpus),
        "folders": task_folders(settings),
        "everybody": settings.share_jobs,
        "key": token_hex(16),
        "typed": False,
    }
    return page(request, "submit", status=status, **values)


def _unix(text: str) -> str:
    """Return a text with the line ends of a recipe file, as a browser's form has others."""
    return text.replace("\r\n", "\n")
