"""Routes of the model library: list, show, label and delete results."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService, audit_details
from llmprune.service.api.error_responses import Refused, documented
from llmprune.service.api.values import DeletedModels, ModelList
from llmprune.service.jobs.job import JOB_ID, Job
from llmprune.service.jobs.library.library import Library
from llmprune.service.jobs.library.models import Labels, Model, ModelQuery, Order, Sort, Stage, may_label, new_labels
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1/models", tags=["models"])

_LABELS_LIMIT = 64 * 1024  # bytes of a body with labels; notes of the longest escapes fit
SearchText = Annotated[str, Query(max_length=200, description="Words of the name, the base, a tag or the notes.")]
TagFilter = Annotated[str | None, Query(max_length=40, description="Only models with this tag.")]
BaseFilter = Annotated[str | None, Query(max_length=500, description="Only models pruned from this one.")]
OwnerFilter = Annotated[str | None, Query(max_length=64, description="Only models of this user.")]
OneId = Annotated[str, Field(pattern=f"^{JOB_ID}$")]
Cursor = Annotated[str | None, Query(max_length=1000, description="The field next of the page before.")]


class Several(BaseModel):
    """Models by the jobs that made them."""

    model_config = ConfigDict(extra="forbid")

    jobs: list[OneId] = Field(min_length=1, max_length=100, description="Ids of the jobs.")


class SeveralLabels(Several):
    """Models, and the change of their labels."""

    labels: Labels


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
    (model,) = label([job], labels, service=service, caller=caller)
    return model


@router.post("/label", responses=documented(404, 409, 413, 422, 507), max_body_size=_LABELS_LIMIT)
def label_models(wanted: SeveralLabels, request: Request, *, service: TheService, caller: TheCaller) -> list[Model]:
    """Change stage, tags and notes of several results: of all of them or of none."""
    audit_details(request, jobs=wanted.jobs, **wanted.labels.model_dump(exclude_defaults=True, exclude={"notes"}))
    return label([*dict.fromkeys(wanted.jobs)], wanted.labels, service=service, caller=caller)


@router.post("/delete", responses=documented(404, 409, 413, 422, 507))
def delete_models(wanted: Several, request: Request, *, service: TheService, caller: TheCaller) -> DeletedModels:
    """Delete several ended jobs with all their files: all of them or none."""
    audit_details(request, jobs=wanted.jobs)
    jobs = [service.own_job(job, caller) for job in dict.fromkeys(wanted.jobs)]
    delete(jobs, service)
    return DeletedModels(deleted=len(jobs))


def delete(jobs: Sequence[Job], service: Service) -> None:
    """Delete ended jobs with all their files, all of them or none. Raises Conflict."""
    newest_first = sorted(jobs, key=lambda job: -job.seq)  # a job is deleted before the one whose model it uses
    service.jobs.delete(*(job.id for job in newest_first))
    for job in jobs:
        shutil.rmtree(service.settings.folder(job.id), ignore_errors=True)


def require_may_label(job: str, labels: Labels, *, service: Service, caller: Caller) -> None:
    """Raise Refused (404, 403) where the caller may not make this change to a model."""
    owner, model = service.job(job, caller).owner, Library(service.database).get(job)
    change = labels if model is None else new_labels(labels, model)
    if may_label(caller, owner, labels=change):
        return
    if change.stage == "approved" and not caller.may_approve():
        raise Refused(403, "only approvers and admins may approve models; ask one of them")
    raise Refused(403, f"model {job} belongs to {owner}; only its owner and admins may change its labels")


def label(jobs: Sequence[str], labels: Labels, *, service: Service, caller: Caller) -> list[Model]:
    """Change the labels of models, all of them or none. Raises Refused (404, 403), Conflict and RecipeError."""
    for job in jobs:
        require_may_label(job, labels, service=service, caller=caller)
    return Library(service.database).label(jobs, labels, by=caller.name)
