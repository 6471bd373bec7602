"""The pages: rendered here, kept fresh by htmx. All of them also work without script."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from secrets import token_hex
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Form, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from llmprune.common.errors import RecipeError
from llmprune.service.api.auth import COOKIE, session_of
from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.api.outputs import artifacts, read_log
from llmprune.service.api.status import queue_of
from llmprune.service.jobs.job import ACTIVE, ENDED, FINISHED, Job, State
from llmprune.service.jobs.recipe_policy import examine, task_folders
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.submission import Submission, can_reevaluate, reevaluate, submit
from llmprune.service.jobs.submission import cancel as cancel_job
from llmprune.service.jobs.submission import retry as try_again
from llmprune.service.jobs.tokens import LOCAL, SESSION_SECONDS
from llmprune.service.planner.queue import PlannerBusy
from llmprune.service.web.compare import compared
from llmprune.service.web.form import START, RecipeForm, changed_by, form_of
from llmprune.service.web.form_body import FormRoute
from llmprune.service.web.render import render, static_file

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse, route_class=FormRoute)

PAGE = 40
_LAST_WORDS = 12  # lines of the log


@router.get("/")
def jobs_page(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    state: Annotated[State | None, Query()] = None,
    search: Annotated[str | None, Query(max_length=200)] = None,
    before: Annotated[int | None, Query(ge=0, le=2**62)] = None,
) -> Response:
    """The jobs that the caller may read, the newest first."""
    states, viewer = (state,) if state else (), service.viewer(caller)
    jobs, after = service.jobs.page(states, None, search=search, before=before, limit=PAGE, viewer=viewer)
    queue = queue_of(service, caller)
    values: dict[str, Any] = {"after": after, "search": search or "", "total": sum(queue.counts.values()), "at": "jobs"}
    jobs = [service.shown(job) for job in jobs]
    return page(request, "jobs", jobs=jobs, state=state, queue=queue, **values)


@router.get("/now")
def jobs_now(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    job: Annotated[list[JobId], Query(default_factory=list, max_length=PAGE)],
    state: Annotated[State | None, Query()] = None,
    total: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """What moves in the list, in one answer: slots and devices, jobs by state, and the lines of jobs not yet ended."""
    jobs = [service.shown(found) for one in job if (found := service.find(one, caller))]
    return page(request, "now", jobs=jobs, state=state, total=total, queue=queue_of(service, caller), oob=True)


@router.get("/jobs/{job}")
def job_page(request: Request, job: JobId, *, service: TheService, caller: TheCaller) -> Response:
    """One job: how far it is, what it said, what it made."""
    found = service.job(job, caller)
    files = artifacts(service, job)
    report = any(file.name == "report.html" for file in files)
    words = _last_words(service, found)
    pushes = service.jobs.page(source=job, viewer=service.viewer(caller))[0]
    more = caller.may_change(found.owner) and can_reevaluate(found, service.settings)
    values: dict[str, Any] = {"files": files, "report": report, "words": words, "pushes": pushes, "more_samples": more}
    return page(request, "job", job=service.shown(found), server=request.base_url, **values)


@router.get("/jobs/{job}/live")
def job_live(request: Request, job: JobId, *, service: TheService, caller: TheCaller) -> Response:
    """The part of a job's page that moves; once it has ended, the whole page comes again."""
    found = service.job(job, caller)
    response = page(request, "live", job=service.shown(found), words=_last_words(service, found), oob=True)
    if found.state in ENDED:
        response.headers["HX-Refresh"] = "true"
    return response


@router.post("/jobs/{job}/cancel")
def cancel(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Cancel the job and go back to its page."""
    cancel_job(service.own_job(job, caller), service.settings, jobs=service.jobs)
    service.nudge()
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/retry")
def retry(
    job: JobId, service: TheService, *, caller: TheCaller, hub_token: Annotated[str, Form(max_length=500)] = ""
) -> Response:
    """Queue an ended job again and go back to its page."""
    token = plain_token(hub_token) if hub_token else None
    try_again(service.own_job(job, caller), token, settings=service.settings, jobs=service.jobs)
    service.nudge()
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/reevaluate")
def evaluate_more(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    limit: Annotated[str, Form(pattern=r"^\d{0,9}$")] = "",
) -> Response:
    """Queue the evaluation of more samples and go back to the job's page."""
    reevaluate(
        service.own_job(job, caller),
        int(limit) if limit else None,
        hub_token=None,
        settings=service.settings,
        jobs=service.jobs,
    )
    service.nudge()
    return RedirectResponse(f"/jobs/{job}", 303)


@router.post("/jobs/{job}/delete")
def delete(job: JobId, service: TheService, *, caller: TheCaller) -> Response:
    """Delete the job with its files and go to the list of jobs."""
    service.own_job(job, caller)
    service.jobs.delete(job)
    shutil.rmtree(service.settings.folder(job), ignore_errors=True)
    return RedirectResponse("/", 303)


@router.get("/submit")
async def submit_page(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    again: Annotated[str | None, Query(max_length=12)] = None,
) -> Response:
    """The form and the editor; ``again`` starts with another job's recipe."""

    def open_editor() -> Response:
        found = service.job(again, caller) if again else None
        return _editor(request, service, wishes=Submission(found.recipe if found else START))

    return await service.turns.run(caller.name, open_editor)


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
    """Queue the recipe in the editor, once however often the button is pressed; what is wrong is said above it."""
    wishes = Submission(
        recipe.replace("\r\n", "\n"),
        name=name.strip() or None,
        launcher=launcher,
        gpus=int(gpus) if gpus else None,
        priority=max(-100, min(100, int(priority or 0))) if priority != "-" else 0,
        time_limit=60.0 * int(minutes) if minutes and int(minutes) else None,
        key=key or None,
        hub_token=plain_token(hub_token) if hub_token else None,
        shared=bool(shared),
    )

    def queue() -> Response:
        try:
            job, _ = submit(wishes, caller, settings=service.settings, jobs=service.jobs)
        except RecipeError as error:
            return _editor(request, service, wishes=wishes, problems=error.problems, status=422)
        except (Conflict, QueueFull) as error:  # Conflict: sent again with another recipe, by the browser's way back
            return _editor(
                request,
                service,
                wishes=wishes,
                problems=[str(error)],
                status=409 if isinstance(error, Conflict) else 429,
            )
        service.nudge()
        return RedirectResponse(f"/jobs/{job.id}", 303)

    return await service.turns.run(caller.name, queue)


@router.post("/submit/compose")
async def compose(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """The recipe in the editor with what the form's answers say otherwise."""
    answers = {key: value for key, value in (await request.form()).items() if isinstance(value, str)}
    text = answers.pop("recipe", "").replace("\r\n", "\n")
    try:
        form = RecipeForm(**answers)
    except ValueError as error:
        raise Refused(422, "an answer is longer than 500 letters") from error

    def composed() -> Response:
        return page(request, "composed", recipe=changed_by(text, form), oob=True)

    return await service.turns.run(caller.name, composed)


@router.post("/submit/check")
async def check(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    recipe: Annotated[str, Form()] = "",
    typed: Annotated[bool, Query(description="In the editor, which the form then follows.")] = False,
) -> Response:
    """What is wrong with the recipe's form; of what is left, the plan is asked for."""
    text = recipe.replace("\r\n", "\n")

    def checked() -> Response:
        try:
            examined = examine(text, (), settings=service.settings)
            problems, rest = examined.problems, examined.recipe is not None
        except RecipeError as error:
            problems, rest = error.problems, False
        values: dict[str, Any] = {"form": form_of(text) if typed else None, "folders": task_folders(service.settings)}
        problems = service.paths.hide_in(problems)
        return page(request, "check", problems=problems, rest=rest, typed=typed, **values)

    return await service.turns.run(caller.name, checked)


@router.post("/submit/plan")
async def plan(
    request: Request, service: TheService, *, caller: TheCaller, recipe: Annotated[str, Form()] = ""
) -> Response:
    """What the recipe would do, or what the plan finds beside what the check has listed.

    Where the planner has no time, the page asks again later.
    """
    text = recipe.replace("\r\n", "\n")
    try:
        examined = await service.turns.run(caller.name, examine, text, (), settings=service.settings)
        answer, listed = await run_in_threadpool(service.plan, examined, caller), bool(examined.problems)
    except RecipeError as error:
        answer, listed = {"problems": service.paths.hide_in(error.problems)}, False
    except PlannerBusy as busy:
        return await run_in_threadpool(page, request, "later", said=str(busy), seconds=math.ceil(busy.wait))
    values = {"plan": answer.get("plan"), "problems": answer.get("problems", []), "listed": listed}
    return await run_in_threadpool(page, request, "plan", **values)


@router.get("/compare")
def compare(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    job: Annotated[list[str], Query(default_factory=list, max_length=50)],
) -> Response:
    """Results side by side."""
    jobs = [service.job(one, caller) for one in dict.fromkeys(job)]
    ended, _ = service.jobs.page((*FINISHED, "failed"), limit=100, viewer=service.viewer(caller))
    choice = [found for found in ended if found.figures]
    return page(request, "compare", compared=compared(jobs), choice=choice, at="compare")


@router.get("/login")
def login_page(request: Request, next: Annotated[str, Query(max_length=500)] = "/") -> Response:
    """Where a token opens a session."""
    return page(request, "login", next=next, wrong=False)


@router.post("/login")
def login(
    request: Request,
    service: TheService,
    *,
    token: Annotated[str, Form(max_length=500)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """Open a session; the token itself is not kept, here or in the browser."""
    session = service.tokens.open_session(token.strip())
    if session is None:
        return page(request, "login", status=401, next=next, wrong=True)
    request.state.caller = service.tokens.session_caller(session)  # for the audit log
    encrypted = request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")
    local = next if next.startswith("/") and not next.startswith(("//", "/\\")) else "/"
    response = RedirectResponse(local, 303)
    response.set_cookie(
        COOKIE,
        session,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=encrypted,
    )
    return response


@router.post("/logout")
def logout(request: Request, service: TheService) -> Response:
    """End the session."""
    session = session_of(request.headers)
    if session:
        service.tokens.close_session(session)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE)
    return response


@router.get("/static/{name}")
def static(name: str) -> Response:
    """Style, script and icon; their addresses change with their contents."""
    found = static_file(name)
    if found is None:
        raise Refused(404, f"there is no file {name!r}")
    content, kind = found
    return Response(content, media_type=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """A page or a part of one, for whoever asks."""
    caller = getattr(request.state, "caller", None)
    known = {"caller": caller, "session": caller not in (None, LOCAL), "at": "", "oob": False}
    return HTMLResponse(render(template, **known | values), status)


def install(app: FastAPI) -> None:
    """Give the app its pages, and have people's mistakes there answered as pages."""
    app.include_router(router)
    app.state.error_page = error_page


def error_page(request: Request, status: int, *, title: str, detail: str, problems: Sequence[str]) -> Response:
    """A problem as a person reads it."""
    return page(request, "error", status=status, title=title, detail=detail, problems=problems)


def _editor(
    request: Request, service: Service, *, wishes: Submission, problems: Sequence[str] = (), status: int = 200
) -> Response:
    settings = service.settings
    values = {
        "launchers": settings.launchers,
        "gpus": len(settings.gpus),
        "folders": task_folders(settings),
        "everybody": settings.share_jobs,
    }
    problems = service.paths.hide_in(list(problems))
    values |= {"wishes": wishes, "key": token_hex(16), "form": form_of(wishes.recipe), "typed": False}
    return page(request, "submit", status=status, recipe=wishes.recipe, problems=problems, **values)


def _last_words(service: Service, job: Job) -> str:
    """The end of the log, for those who wait or wonder."""
    log = service.settings.log(job.id)
    if job.state not in (*ACTIVE, "failed") or not log.is_file():
        return ""
    text, _ = read_log(service, job.id, offset=max(0, log.stat().st_size - 4_000), size=4_000)
    return "\n".join(text.decode("utf-8", "replace").splitlines()[-_LAST_WORDS:])


def plain_token(token: str) -> str:
    """A hub token as it may stand in a file: printable ASCII."""
    stripped = token.strip()
    if not (stripped.isascii() and stripped.isprintable()) or " " in stripped:
        raise Refused(422, "the hub token has letters that no hub token has; copy it again")
    return stripped
