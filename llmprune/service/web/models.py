"""The page of the model library: search, filters, order, and actions on ticked models."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import Form, Query, Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from llmprune.common.errors import RecipeError
from llmprune.service.api.dependencies import JobId, TheCaller, TheService, audit_details
from llmprune.service.api.error_responses import Refused
from llmprune.service.api.library.models import (
    BaseFilter,
    Cursor,
    OwnerFilter,
    SearchText,
    TagFilter,
    label,
)
from llmprune.service.api.library.models import delete as delete_jobs
from llmprune.service.jobs.library.library import Library
from llmprune.service.jobs.library.models import STAGES, Labels, ModelQuery, Order, Sort, Stage, tags_of
from llmprune.service.web.form_body import many
from llmprune.service.web.responses import page, page_router
from llmprune.service.web.uploads import form_values

router = page_router()

PAGE_SIZE = 40  # models; a form has at most 50 fields
_COLUMNS: dict[Sort, str] = {
    "name": "model", "stage": "stage", "size": "size", "parameters": "parameters", "retention": "retained",
    "speed": "speed", "owner": "owner", "finished": "finished",
}  # fmt: skip
# Columns that begin with the smallest; the others begin with the largest.
_FIRST_UP: tuple[Sort, ...] = ("name", "base", "stage", "owner", "size", "parameters", "bytes")
_FILTERS = ("search", "stage", "tag", "base", "owner", "sort", "order")


@router.get("/models")
def models_page(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    search: SearchText = "",
    stage: Annotated[Stage | Literal[""], Query()] = "",
    tag: TagFilter = None,
    base: BaseFilter = None,
    owner: OwnerFilter = None,
    sort: Annotated[Sort, Query()] = "finished",
    order: Annotated[Order | Literal[""], Query()] = "",
    after: Cursor = None,
) -> Response:
    """Show the results that the caller may read."""
    query = ModelQuery(
        viewer=service.viewer(caller),
        search=search.strip(),
        stage=stage or None,
        tag=tag or None,
        base=base or None,
        owner=owner or None,
        sort=sort,
        order=order or first_order(sort),
        after=after or None,
        limit=PAGE_SIZE,
    )
    found = Library(service.database).page(query)
    values: dict[str, Any] = {"models": found.models, "query": query, "stages": STAGES, "columns": _COLUMNS}
    following = address(query, after=found.next) if found.next else None
    values |= {"following": following, "filtered": _is_filtered(query), **form_values(request, service)}
    values |= {"usual": first_order, "link": lambda **changes: address(query, **changes)}
    return page(request, "library", at="models", **values)


@router.get("/models/choices")
def choices(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Return the tags, bases and owners that the filters suggest."""
    return page(request, "choices", choices=Library(service.database).choices(service.viewer(caller)))


@router.post("/models/label")
async def label_ticked(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Change the labels of the ticked models and return to the list."""
    form = await request.form()
    do, stage = str(form.get("do", "")), str(form.get("to_stage", ""))
    tags = tags_of(str(form.get("tags", ""))[:1000])
    jobs = many(form, "job")
    if do in ("tag", "untag") and not tags:
        raise RecipeError("tags: give one or more, separated by commas", "labels")
    if do == "stage" and stage not in STAGES:
        raise RecipeError(f"stage: choose {', '.join(STAGES)}", "labels")
    labels = {"tag": Labels(add_tags=tags), "untag": Labels(remove_tags=tags)}
    changes = labels.get(do) or Labels.model_validate({"stage": stage})

    audit_details(request, jobs=jobs, **changes.model_dump(exclude_defaults=True))
    await run_in_threadpool(label, jobs, changes, service=service, caller=caller)
    return RedirectResponse(_back(str(form.get("back", ""))), 303)


@router.post("/models/delete")
async def delete_ticked(request: Request, service: TheService, *, caller: TheCaller) -> Response:
    """Ask whether to delete the ticked models; delete them where that was answered."""
    form = await request.form()
    jobs, back = many(form, "job"), _back(str(form.get("back", "")))

    def delete() -> Response:
        found = [service.own_job(job, caller) for job in jobs]
        if form.get("sure") != "yes":
            return page(request, "delete_models", jobs=found, back=back, at="models")
        audit_details(request, jobs=jobs)
        delete_jobs(found, service)
        return RedirectResponse(back, 303)

    return await run_in_threadpool(delete)


@router.post("/jobs/{job}/labels")
def label_job(
    job: JobId,
    service: TheService,
    *,
    caller: TheCaller,
    stage: Annotated[Stage, Form()],
    tags: Annotated[str, Form(max_length=1000)] = "",
    notes: Annotated[str, Form(max_length=4000)] = "",
) -> Response:
    """Change the labels of a model and return to its job's page."""
    label(
        [job],
        Labels(stage=stage, tags=tags_of(tags), notes=notes.replace("\r\n", "\n")),
        service=service,
        caller=caller,
    )
    return RedirectResponse(f"/jobs/{job}#library", 303)


def address(query: ModelQuery, **changes: Any) -> str:
    """Return the address of the list with another filter or order; it begins at the first page unless told."""
    wanted = asdict(replace(query, **{"after": None} | changes))
    given = {name: wanted[name] for name in (*_FILTERS, "after") if wanted[name]}
    if given.get("order") == first_order(given["sort"]):
        del given["order"]
    if given["sort"] == "finished":
        del given["sort"]
    return f"/models?{urlencode(given)}" if given else "/models"


def first_order(sort: Sort) -> Order:
    """Return the order in which a column is sorted first."""
    return "asc" if sort in _FIRST_UP else "desc"


def _is_filtered(query: ModelQuery) -> bool:
    return any((query.search, query.stage, query.tag, query.base, query.owner))


def _back(address: str) -> str:
    """Return an address of the list that a form holds. Raises Refused (422) for any other."""
    if not (address == "/models" or address.startswith("/models?")) or not address.isprintable():
        raise Refused(422, "the form has no address of the list to return to")
    return address
