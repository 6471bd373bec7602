"""Time that each answer to "how much time?" would take, beside the answers of the page for a new job."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import Form, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from llmprune.common.errors import RecipeError
from llmprune.common.time_left import rough_duration
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.monitoring.run_progress import WORDS
from llmprune.service.planner.queue import PlannerBusy
from llmprune.service.recipe_policy.policy import ExaminedRecipe, examine
from llmprune.service.users.tokens import Caller
from llmprune.service.web.new_job.drafts import unix_text
from llmprune.service.web.new_job.form import apply_form, form_of
from llmprune.service.web.new_job.repairs import REPAIRS
from llmprune.service.web.responses import page, page_router

router = page_router()

_LONGEST = 3  # steps that a plan names


@router.post("/submit/times")
async def times(
    request: Request, service: TheService, *, caller: TheCaller, recipe: Annotated[str, Form()] = ""
) -> Response:
    """Show how long the recipe would run with each answer; nothing beside those whose time is not known."""
    text = unix_text(recipe)
    variants = await service.recipe_queue.run(caller.name, partial(_variants, text, service=service, caller=caller))
    try:
        found = await run_in_threadpool(service.times, list(variants.values()), caller)
    except PlannerBusy:
        return Response(status_code=204)
    known = {name: in_words(time) for name, time in zip(variants, found, strict=True) if time is not None}
    return await run_in_threadpool(page, request, "times", repairs=REPAIRS, takes=known)


def in_words(time: dict[str, Any]) -> str:
    """Return an estimate such as ``about 12 min``."""
    words = rough_duration(time["seconds"])
    return f"about {words}" if time["is_complete"] else f"more than {words}: tasks come on top"


def time_values(plan: dict[str, Any] | None) -> dict[str, Any]:
    """Return the time of a plan in words, and its longest steps with their seconds."""
    durations = plan and plan["durations"]
    if not durations:
        return {}
    steps: dict[str, float] = {}
    for part in durations["parts"]:
        name = WORDS.get(part["step"], part["step"])
        steps[name] = steps.get(name, 0.0) + (part["seconds"] or 0.0)
    longest = sorted(steps.items(), key=lambda step: -step[1])[:_LONGEST]
    is_complete = all(part["seconds"] is not None for part in durations["parts"])
    return {"takes": in_words({"seconds": durations["total"], "is_complete": is_complete}), "longest": longest}


def _variants(text: str, *, service: Service, caller: Caller) -> dict[str, ExaminedRecipe]:
    """Return the recipe as each answer would change it, as the policy allows it, by the name of the answer.

    A recipe that may not run is left out.
    """
    form, found = form_of(text), {}
    for repair in REPAIRS if form is not None else ():
        try:
            changed = apply_form(text, form.model_copy(update={"repair": repair.name})) if form else text
            examined = examine(changed, (), settings=service.settings, model_of=service.models(caller).folder)
        except RecipeError:
            continue
        if examined.recipe is not None and not examined.problems:
            found[repair.name] = examined
    return found
