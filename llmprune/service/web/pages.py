"""Pages of jobs: the list, one job, the comparison. htmx refreshes them; all of them also work without script."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.responses import Response

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import Refused
from llmprune.service.api.files.outputs import artifacts, read_log
from llmprune.service.api.library.compare import compared
from llmprune.service.api.monitoring.status import queue_of
from llmprune.service.jobs.comparison import MOST_COMPARED, bytes_on_disk, compare_reports
from llmprune.service.jobs.follow_ups.reevaluation import can_reevaluate
from llmprune.service.jobs.job import ACTIVE, ENDED, FINISHED, Job, JobQuery, State
from llmprune.service.web.compare import comparison_of
from llmprune.service.web.job.about import about_of
from llmprune.service.web.job.bench import bench_of
from llmprune.service.web.job.kept import kept_of
from llmprune.service.web.job.live_values import live_values, notification_values, places_of, usage_values
from llmprune.service.web.job.next_steps import next_steps_of
from llmprune.service.web.job.search import has_budget, search_of
from llmprune.service.web.render import static_file
from llmprune.service.web.responses import page, page_router

router = page_router()

PAGE_SIZE = 40  # jobs
_LOG_LINES, _LOG_BYTES = 12, 4_000  # of the end of the log on a job's page


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
    """Show the jobs that the caller may read, the newest first."""
    states, viewer = (state,) if state else (), service.viewer(caller)
    found = service.jobs.page(JobQuery(viewer, states, search=search, before=before, limit=PAGE_SIZE))
    queue = queue_of(service, caller)
    values: dict[str, Any] = {"jobs": [service.shown(job) for job in found.jobs], "after": found.next, "at": "jobs"}
    values["places"] = places_of(service, found.jobs)
    values |= {"state": state, "search": search or "", "queue": queue, "total": sum(queue.counts.values())}
    return page(request, "jobs", **values)


@router.get("/now")
def jobs_now(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    job: Annotated[list[JobId], Query(default_factory=list, max_length=PAGE_SIZE)],
    state: Annotated[State | None, Query()] = None,
    total: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """Refresh the list: slots and devices, jobs by state, and the rows of the jobs that had not ended."""
    found = service.jobs.page(JobQuery(service.viewer(caller), ids=job, limit=PAGE_SIZE)).jobs if job else []
    jobs = [service.shown(one) for one in found]
    values: dict[str, Any] = {"queue": queue_of(service, caller), "places": places_of(service, jobs)}
    return page(request, "now", jobs=jobs, state=state, total=total, oob=True, **values)


@router.get("/jobs/{job}")
def job_page(request: Request, job: JobId, *, service: TheService, caller: TheCaller) -> Response:
    """Show a job: its progress, the end of its log, its files and its report."""
    found = service.job(job, caller)
    files = artifacts(service, job)
    values: dict[str, Any] = {
        "job": service.shown(found),
        "files": files,
        "report": any(file.name == "report.html" for file in files),
        "log_end": _log_end(service, found),
        "pushes": service.jobs.page(JobQuery(service.viewer(caller), source=job)).jobs,
        "more_samples": caller.may_change(found.owner) and can_reevaluate(found, service.settings),
        "server": request.base_url,
        "search": search_of(service, job),
        "next": next_steps_of(service, found, caller=caller),
        "kept": kept_of(service, found),
        "bench": bench_of(service, job),
        "waiting": _is_searching(found),
        **live_values(service, found),
        **usage_values(service, found),
        **notification_values(service, found, caller=caller),
        "about": about_of(service, caller, job=found),
    }
    return page(request, "job", **values)


@router.get("/jobs/{job}/live")
def job_live(request: Request, job: JobId, *, service: TheService, caller: TheCaller) -> Response:
    """Refresh the progress on a job's page; once the job has ended, the whole page is loaded again."""
    found = service.job(job, caller)
    values = {"log_end": _log_end(service, found), **live_values(service, found)}
    response = page(request, "live", job=service.shown(found), oob=True, **values)
    if found.state in ENDED:
        response.headers["HX-Refresh"] = "true"
    return response


@router.get("/jobs/{job}/usage")
def job_usage(request: Request, job: JobId, *, service: TheService, caller: TheCaller) -> Response:
    """Refresh what a job uses of the machine."""
    found = service.job(job, caller)
    return page(request, "usage", job=service.shown(found), **usage_values(service, found))


@router.get("/jobs/{job}/search")
def job_search(
    request: Request,
    job: JobId,
    *,
    service: TheService,
    caller: TheCaller,
    seen: Annotated[str, Query(max_length=20)] = "",
) -> Response:
    """Refresh the shapes on a job's page; ``seen``: what the page shows, which stays where nothing is new."""
    found, search = service.job(job, caller), search_of(service, job)
    if _is_searching(found) and (search.seen if search else "") == seen:
        return Response(status_code=204)
    waiting = _is_searching(found)
    return page(request, "search", job=service.shown(found), search=search, waiting=waiting, report=False)


@router.get("/compare")
def compare(
    request: Request,
    service: TheService,
    *,
    caller: TheCaller,
    job: Annotated[list[str], Query(default_factory=list, max_length=MOST_COMPARED)],
) -> Response:
    """Show the results of several jobs next to each other."""
    jobs = compared(job, service, caller=caller)
    disk = {one.id: bytes_on_disk(one.id, service.settings) for one in jobs}
    found = comparison_of(jobs, compare_reports(jobs, service.settings), disk=disk)
    ended = service.jobs.page(JobQuery(service.viewer(caller), (*FINISHED, "failed"), limit=100)).jobs
    choice = [one for one in ended if one.figures]
    return page(request, "compare", compared=found, choice=choice, at="compare")


@router.get("/static/{name}")
def static(name: str) -> Response:
    """Return a static file. Its address changes with its contents, so browsers may cache it for ever."""
    found = static_file(name)
    if found is None:
        raise Refused(404, f"there is no file {name!r}")
    content, kind = found
    return Response(content, media_type=kind, headers={"Cache-Control": "public, max-age=31536000, immutable"})


def _is_searching(job: Job) -> bool:
    """Return whether more shapes may be tried in a job."""
    return job.state not in ENDED and has_budget(job.recipe)


def _log_end(service: Service, job: Job) -> str:
    """Return the last lines of the log of a job that runs or has failed."""
    log = service.settings.log(job.id)
    if job.state not in (*ACTIVE, "failed") or not log.is_file():
        return ""
    text, _ = read_log(service, job.id, offset=max(0, log.stat().st_size - _LOG_BYTES), size=_LOG_BYTES)
    return "\n".join(text.decode("utf-8", "replace").splitlines()[-_LOG_LINES:])
