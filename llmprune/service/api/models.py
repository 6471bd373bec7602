"""Routes of the model library: list, show and label results."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.values import ModelList
from llmprune.service.jobs.library import Library
from llmprune.service.jobs.models import Labels, Model, ModelQuery, Order, Sort, Stage, may_label, new_labels
from llmprune.service.jobs.tokens import Caller

router = APIRouter(prefix="/v1/models", tags=["models"])

_LABELS_LIMIT = 64 * 1024  # bytes of a body with labels; notes of the longest escapes fit
SearchText = Annotated[str, Query(max_length=200, description="Words of the name, the base, a tag or the notes.")]
TagFilter = Annotated[str | None, Query(max_length=40, description="Only models with this tag.")]
BaseFilter = Annotated[str | None, Query(max_length=500, description="Only models pruned from this one.")]
OwnerFilter = Annotated[str | None, Query(max_length=64, description="Only models of this user.")]
Cursor = Annotated[str | None, Query(max_length=1000, description="The field next of the page before.")]


@router.get("", responses=documented(404, 422))
def list_models(
    service: TheService,
    caller: TheCaller,
    *,
    search: SearchText = "",
    stage: Annotated[Stage | None, Query(description="Only models of this stage.")] = None,
    tag: TagFilter = None,
    base: BaseFilter = None,
    owner: OwnerFilter = None,
    sort: Annotated[Sort, Query(description="Order of the list; speed: pruned / dense.")] = "finished",
    order: Annotated[Order, Query()] = "desc",
    after: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Maximum number of models on the page.")] = 50,
) -> ModelList:
    """List the results that the caller may read."""
    query = ModelQuery(
        viewer=service.viewer(caller),
        search=search,
        stage=stage,
        tag=tag,
        base=base,
        owner=owner,
        sort=sort,
        order=order,
        after=after,
        limit=limit,
    )
    page = Library(service.database).page(query)
    return ModelList(models=page.models, next=page.next)


@router.get("/{job}", responses=documented(404, 422))
def show_model(job: JobId, service: TheService, *, caller: TheCaller) -> Model:
    """Show a result with its labels."""
    found = Library(service.database).get(service.job(job, caller).id)
    if found is None:
        raise Refused(404, f"job {job} has no result")
    return found


@router.patch("/{job}", responses=documented(404, 409, 413, 422, 507), max_body_size=_LABELS_LIMIT)
def label_model(job: JobId, labels: Labels, *, service: TheService, caller: TheCaller) -> Model:
    """Change stage, tags and notes of a result. The report and the model's card are not changed."""
    return label(job, labels, service=service, caller=caller)


def require_may_label(job: str, labels: Labels, *, service: Service, caller: Caller) -> None:
    """Raise Refused (404, 403) where the caller may not make this change to a model."""
    owner, model = service.job(job, caller).owner, Library(service.database).get(job)
    change = labels if model is None else new_labels(labels, model)
    if may_label(caller, owner, labels=change):
        return
    if change.stage == "approved" and not caller.may_approve():
        raise Refused(403, "only approvers and admins may approve models; ask one of them")
    raise Refused(403, f"model {job} belongs to {owner}; only its owner and admins may change its labels")


def label(job: str, labels: Labels, *, service: Service, caller: Caller) -> Model:
    """Change the labels of a model. Raises Refused (404, 403), Conflict and RecipeError."""
    require_may_label(job, labels, service=service, caller=caller)
    return Library(service.database).label(job, labels, by=caller.name)
