"""Routes that compare jobs: figures, warnings and differences of recipes, as JSON and as CSV."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from llmprune.service.api.dependencies import Service, TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.api.values import Compared, Comparison, RecipeDifference
from llmprune.service.jobs.comparison import MOST_COMPARED, as_csv, bytes_on_disk, compare_reports
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.library.library import Library
from llmprune.service.users.tokens import Caller

router = APIRouter(prefix="/v1", tags=["models"])

ComparedIds = Annotated[
    list[str], Query(min_length=1, max_length=MOST_COMPARED, alias="job", description="Ids of jobs.")
]


@router.get("/compare", responses=documented(404, 422))
def compare_jobs(ids: ComparedIds, service: TheService, *, caller: TheCaller) -> Comparison:
    """Compare the results of several jobs."""
    jobs = compared(ids, service, caller=caller)
    models, found = Library(service.database).labels([job.id for job in jobs]), compare_reports(jobs, service.settings)
    hide = service.paths.hide_in
    return Comparison(
        jobs=[
            Compared(
                **job.model_dump(include={"id", "name", "owner", "model", "state", "figures"}),
                stage=models[job.id].stage if job.id in models else None,
                tags=models[job.id].tags if job.id in models else (),
                disk=bytes_on_disk(job.id, service.settings),
            )
            for job in jobs
        ],
        warnings=list(found.warnings),
        recipe=[RecipeDifference(key=one.key, values=hide(one.values)) for one in found.differences],
    )


@router.get(
    "/compare.csv", response_class=Response, responses=documented(404, 422) | {200: {"content": {"text/csv": {}}}}
)
def compare_csv(ids: ComparedIds, service: TheService, *, caller: TheCaller) -> Response:
    """Return all figures of several jobs as CSV, with the units in the heads."""
    jobs = compared(ids, service, caller=caller)
    models = Library(service.database).labels([job.id for job in jobs])
    headers = {"Content-Disposition": 'attachment; filename="llmprune.csv"'}
    return Response(
        as_csv(jobs, models, settings=service.settings), media_type="text/csv; charset=utf-8", headers=headers
    )


def compared(ids: list[str], service: Service, *, caller: Caller) -> list[Job]:
    """Return the jobs of these ids, each once. Raises Refused (404)."""
    return [service.job(one, caller) for one in dict.fromkeys(ids)]
