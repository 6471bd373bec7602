"""The draft of the page for a new job: stored while one writes, shown again until it is submitted or discarded."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Form, Request
from fastapi.responses import RedirectResponse, Response

from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.jobs.drafts import Draft, Drafts, TooLong
from llmprune.service.jobs.submission import Submission
from llmprune.service.users.tokens import Caller
from llmprune.service.web.new_job.first_recipe import first_recipe
from llmprune.service.web.responses import page, page_router

router = page_router()

Digits = Annotated[str, Form(pattern=r"^\d{0,6}$")]


@router.post("/submit/draft")
async def keep(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    recipe: Annotated[str, Form()] = "",
    name: Annotated[str, Form(max_length=120)] = "",
    launcher: Annotated[str, Form(max_length=20)] = "local",
    gpus: Digits = "",
    priority: Annotated[str, Form(pattern=r"^-?\d{0,3}$")] = "",
    minutes: Digits = "",
    shared: Annotated[Literal["on", ""], Form()] = "",
) -> Response:
    """Store the draft and say so."""
    settings = {"name": name, "launcher": launcher, "gpus": gpus, "priority": priority, "minutes": minutes}
    draft = Draft(unix_text(recipe), settings | {"shared": shared})

    def kept() -> Response:
        return page(request, "draft_state", problem=save_draft(service, caller, submission=submission_of(draft)))

    return await service.recipe_queue.run(caller.name, kept)


@router.post("/submit/draft/discard")
async def discard(service: TheService, *, caller: TheCaller) -> Response:
    """Discard the draft and begin anew."""
    await service.recipe_queue.run(caller.name, Drafts(service.database).discard, caller.name)
    return RedirectResponse("/submit", 303)


def save_draft(service: Service, caller: Caller, *, submission: Submission) -> str | None:
    """Store a submission as the caller's draft; what every new page shows is none. Return why it was not stored."""
    drafts = Drafts(service.database)
    draft = Draft(submission.recipe, _settings_of(submission))
    if draft.recipe == first_recipe(service.settings) and not draft.settings:
        drafts.discard(caller.name)
        return None
    try:
        drafts.save(caller.name, draft)
    except TooLong as error:
        return str(error)
    return None


def submission_of(draft: Draft) -> Submission:
    """Return the submission that a draft would make."""
    given = draft.settings.get
    priority, minutes, gpus = given("priority", ""), given("minutes", ""), given("gpus", "")
    return Submission(
        draft.recipe,
        name=given("name", "").strip() or None,
        launcher=given("launcher", "local"),
        gpus=int(gpus) if gpus else None,
        priority=max(-100, min(100, int(priority or 0))) if priority != "-" else 0,
        time_limit=60.0 * int(minutes) if minutes and int(minutes) else None,
        shared=bool(given("shared", "")),
    )


def _settings_of(submission: Submission) -> dict[str, str]:
    """Return the fields of the page, without the hub token and those that have their first value."""
    limit = submission.time_limit
    fields = {
        "name": submission.name or "",
        "launcher": submission.launcher if submission.launcher != "local" else "",
        "gpus": "" if submission.gpus is None else str(submission.gpus),
        "priority": str(submission.priority or ""),
        "minutes": "" if limit is None else str(int(limit / 60)),
        "shared": "on" if submission.shared else "",
    }
    return {name: value for name, value in fields.items() if value}


def unix_text(text: str) -> str:
    """Return a text with the line ends of a recipe file, as a browser's form has others, and without NUL."""
    return text.replace("\r\n", "\n").replace("\0", "")
