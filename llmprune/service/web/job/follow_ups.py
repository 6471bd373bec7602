"""The form of a follow-up on a job's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError

from llmprune.common.errors import RecipeError
from llmprune.service.api.dependencies import JobId, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.jobs.follow_ups.follow_ups import FollowUp, submit_follow_up
from llmprune.service.jobs.follow_ups.work import ANY_WORK, Work
from llmprune.service.web.responses import page_router, plain_token

router = page_router()

_TASK = "task-"  # begins the names of the checkboxes
_HUB = "on"  # value of the checkbox of a task that lm-eval has; that of another is its folder
_LONGEST = 2_000  # characters of a field
_NUMBERS = ("limit", "layers", "new_tokens", "repeats")
_FRACTIONS = ("keep", "mlp")  # the form has percent


@router.post("/jobs/{job}/follow-ups")
async def ask_for_follow_up(request: Request, job: JobId, *, service: TheService, caller: TheCaller) -> Response:
    """Queue a follow-up and show its page."""
    form = {key: str(value).strip() for key, value in (await request.form()).items()}
    if any(len(value) > _LONGEST for value in form.values()):
        raise Refused(422, f"a field of the form is longer than {_LONGEST:,} letters")

    def submit() -> Response:
        wanted = FollowUp(
            parent=service.job(job, caller),
            work=_work_of(form),
            launcher=form.get("launcher") or "local",
            gpus=_number("gpus", form["gpus"]) if form.get("gpus") else None,
            hub_token=plain_token(form.get("hub_token", "")),
        )
        made, _ = submit_follow_up(wanted, caller, settings=service.settings, jobs=service.jobs)
        service.wake()
        return RedirectResponse(f"/jobs/{made.id}", 303)

    return await service.recipe_queue.run(caller.name, submit)


def _work_of(form: Mapping[str, str]) -> Work:
    """Return the work that the fields of a form stand for. Raises RecipeError."""
    kind = form.get("kind", "")
    values: dict[str, Any] = {"kind": kind}
    values |= {name: _number(name, form[name]) for name in _NUMBERS if form.get(name)}
    values |= {name: _number(name, form[name]) / 100 for name in _FRACTIONS if form.get(name)}
    values |= {name: form[name] for name in ("tokens", "pattern", "dtype", "include_path") if form.get(name)}
    values |= {name: _list(form[name]) for name in ("batch_sizes", "contexts") if form.get(name)}
    if form.get("hours"):
        values["hours"] = _number("hours", form["hours"])
    if kind == "evaluate":
        chosen = {name.removeprefix(_TASK): folder for name, folder in form.items() if name.startswith(_TASK)}
        if folders := {*chosen.values(), form.get("include_path", "")} - {"", _HUB}:
            if len(folders) > 1:
                raise RecipeError(f"tasks: those of {' and '.join(sorted(folders))} need a job for each", "follow-up")
            values["include_path"] = folders.pop()
        values["tasks"] = list(dict.fromkeys([*chosen, *_list(form.get("tasks", ""))]))
        if not values["tasks"]:
            raise RecipeError("tasks: choose at least one, or type its name", "follow-up")
    try:
        return ANY_WORK.validate_python(values)
    except ValidationError as error:
        raise RecipeError([_sentence(one) for one in error.errors(include_url=False)], "follow-up") from error


def _sentence(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"][1:])
    return f"{place}: {problem['msg']}" if place else str(problem["msg"]).removeprefix("Value error, ")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(name: str, text: str) -> Any:
    """Return the number in a field. Raises RecipeError."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise RecipeError(f"{name}: {text[:40]!r} is no number", "follow-up")
