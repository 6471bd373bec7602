"""Pages of sweeps: the form that makes one, and the page that compares its jobs as they finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from fastapi.responses import RedirectResponse, Response

from llmprune.common.errors import RecipeError
from llmprune.recipe.recipe import Recipe
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.jobs.sweeps import SweepId, own_sweep, readable_sweep, shown
from llmprune.service.jobs.comparison import compare_reports
from llmprune.service.jobs.store_reads import Conflict, QueueFull
from llmprune.service.jobs.submission import Submission
from llmprune.service.jobs.sweeps.axes import Axis, Sweep, make_axis
from llmprune.service.jobs.sweeps.sweeps import (
    SweepSubmission,
    cancel_sweep,
    list_sweeps,
    new_jobs,
    scores_shared,
    submit_sweep,
)
from llmprune.service.users.tokens import Caller
from llmprune.service.web.compare import comparison_of
from llmprune.service.web.new_job.first_recipe import first_recipe
from llmprune.service.web.responses import page, page_router

router = page_router()

_ROWS = 3  # keys in the form
_FIRST = ("budget.parameters", "0.9, 0.8, 0.7")
SUGGESTED = (
    "budget.parameters", "budget.weights", "budget.kv_cache", "budget.speed", "depth.remove", "depth.criterion",
    "width.mlp", "width.heads", "width.criterion", "experts.keep", "hidden.keep", "vocabulary.coverage",
    "sparsity.pattern", "calibration.samples", "calibration.sequence_length", "recover.tokens", "model.id",
)  # fmt: skip


@dataclass(frozen=True)
class SweepForm:
    """The form of a sweep as it was filled in."""

    recipe: str
    name: str = ""
    gpus: str = ""
    shared: str = ""
    rows: Sequence[tuple[str, str]] = (_FIRST,)

    def axes(self) -> tuple[Axis, ...]:
        """Return the axes of the rows that have a key or values. Raises RecipeError."""
        return tuple(make_axis(key.strip(), values) for key, values in self.rows if key.strip() or values.strip())

    def submission(self, key: str | None = None) -> SweepSubmission:
        """Return the sweep to be submitted. Raises RecipeError."""
        base = Submission(
            self.recipe,
            name=self.name or None,
            gpus=int(self.gpus) if self.gpus else None,
            key=key,
            shared=bool(self.shared),
        )
        return SweepSubmission(base, self.axes())


@router.get("/sweep")
async def sweep_form(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    again: Annotated[str | None, Query(max_length=12)] = None,
) -> Response:
    """Show the form of a sweep. ``again``: a job whose recipe to start with."""

    def open_form() -> Response:
        recipe = service.job(again, caller).recipe if again else first_recipe(service.settings)
        return _form(request, service, caller=caller, form=SweepForm(recipe))

    return await service.recipe_queue.run(caller.name, open_form)


@router.post("/sweep/new")
async def sweep_of_new_job(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Show the form of a sweep with what was written on the page of a new job. Nothing is queued."""
    fields = await request.form()
    form = _form_of(fields)
    form = replace(form, rows=(_first_row(form.recipe),))
    others = {"launcher": "Runs on", "priority": "Priority", "minutes": "Maximum minutes", "hub_token": "Hub token"}
    lost = [label for name, label in others.items() if fields.get(name) not in (None, "", "local")]

    def open_form() -> Response:
        return _form(request, service, caller=caller, form=form, lost=lost)

    return await service.recipe_queue.run(caller.name, open_form)


@router.post("/sweep")
async def make_sweep(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Queue the jobs of a sweep, once however often the button is pressed, or show what is wrong."""
    fields = await request.form()
    form = _form_of(fields)
    key = str(fields.get("key", ""))[:100] or None

    def queue() -> Response:
        status, problems = 422, list[str]()
        try:
            sweep, _ = submit_sweep(form.submission(key), caller, settings=service.settings, jobs=service.jobs)
        except RecipeError as error:
            problems = error.problems
        except Conflict as error:
            status, problems = 409, [str(error)]
        except QueueFull as error:
            status, problems = 429, [str(error)]
        if problems:
            return _form(request, service, caller=caller, form=form, problems=problems, status=status)
        service.wake()
        return RedirectResponse(f"/sweeps/{sweep.id}", 303)

    return await service.recipe_queue.run(caller.name, queue)


@router.post("/submit/sweep")
async def check_sweep(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Show the jobs that the form would make, or what is wrong with it. Nothing is queued."""
    form = _form_of(await request.form())

    def check() -> Response:
        try:
            planned = new_jobs(form.submission(), caller, settings=service.settings, jobs=service.jobs)
            names, problems = [new.request.name for _, new in planned], list[str]()
            shared = [*scores_shared([new for _, new in planned], service.settings).values()]
        except RecipeError as error:
            names, shared, problems = [], [], service.paths.hide_in(error.problems)
        return page(request, "sweep_check", names=names, shared=shared, problems=problems)

    return await service.recipe_queue.run(caller.name, check)


@router.get("/sweeps/{sweep}")
def sweep_page(request: Request, sweep: SweepId, *, service: TheService, caller: TheCaller) -> Response:
    """Compare the jobs of a sweep."""
    found = shown(readable_sweep(sweep, service, caller=caller), service)
    return page(request, "sweep_page", at="models", **_compared(found, service, caller=caller))


@router.get("/sweeps/{sweep}/now")
def sweep_now(request: Request, sweep: SweepId, *, service: TheService, caller: TheCaller) -> Response:
    """Refresh the comparison."""
    found = shown(readable_sweep(sweep, service, caller=caller), service)
    return page(request, "sweep_now", **_compared(found, service, caller=caller))


@router.post("/sweeps/{sweep}/cancel")
def cancel_all(sweep: SweepId, service: TheService, *, caller: TheCaller) -> Response:
    """Cancel the jobs of a sweep that wait or run, and return to its page."""
    cancel_sweep(own_sweep(sweep, service, caller=caller), service.settings, jobs=service.jobs)
    service.wake()
    return RedirectResponse(f"/sweeps/{sweep}", 303)


def _compared(sweep: Sweep, service: Service, *, caller: Caller) -> dict[str, Any]:
    """Return the values of the page of a sweep."""
    jobs = [one.job for one in sweep.jobs]
    done = [job for job in jobs if job.figures]
    compared = comparison_of(jobs, compare_reports(done, service.settings))
    active = [job for job in jobs if not job.ended]
    return {
        "sweep": sweep,
        "compared": compared,
        "active": active,
        "done": done,
        "may_change": caller.may_change(sweep.owner),
    }


def _first_row(recipe: str) -> tuple[str, str]:
    """Return a key of a recipe that a sweep may vary, with values around its own; nothing where it has no size."""
    try:
        data = Recipe.read(recipe).data
    except RecipeError:
        return "", ""
    depth, width, budget = (_mapping(data.get(name)) for name in ("depth", "width", "budget"))
    if budget:
        return _FIRST if "parameters" in budget else ("", "")
    if isinstance(number := depth.get("remove"), int) and 0 < number < 10_000:
        return "depth.remove", f"{number}, {number + 1}, {number + 2}"
    if "mlp" in width:
        return "width.mlp", "0.9, 0.8, 0.7"
    return "", ""


def _mapping(section: object) -> dict[str, Any]:
    return section if isinstance(section, dict) else {}


def _form_of(fields: Any) -> SweepForm:
    """Return the form that was sent."""
    given = {name: str(value) for name, value in fields.items()}
    rows = [(given.get(f"key_{row}", "")[:200], given.get(f"values_{row}", "")[:2000]) for row in range(_ROWS)]
    gpus = given.get("gpus", "")
    shared: Literal["on", ""] = "on" if given.get("shared") == "on" else ""
    return SweepForm(
        recipe=given.get("recipe", "").replace("\r\n", "\n"),
        name=given.get("name", "").strip()[:80],
        gpus=gpus if gpus.isdecimal() and gpus.isascii() and len(gpus) <= 4 else "",
        shared=shared,
        rows=rows,
    )


def _form(
    request: Request,
    service: Service,
    *,
    caller: Caller,
    form: SweepForm,
    problems: Sequence[str] = (),
    lost: Sequence[str] = (),
    status: int = 200,
) -> Response:
    rows = [*form.rows, *[("", "")] * (_ROWS - len(form.rows))]
    values: dict[str, Any] = {"form": form, "rows": rows, "problems": service.paths.hide_in(list(problems))}
    values |= {
        "lost": lost,
        "suggested": SUGGESTED,
        "gpus": len(service.settings.gpus),
        "everybody": service.settings.share_jobs,
    }
    values |= {"sweeps": list_sweeps(service.database, service.viewer(caller)), "key": token_hex(16)}
    return page(request, "sweep", status=status, at="models", **values)
