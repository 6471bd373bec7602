"""Routes of a job while it runs: its progress, and its use of the machine."""

from __future__ import annotations

from fastapi import APIRouter

from llmprune.service.api.dependencies import JobId, Service, TheCaller, TheService
from llmprune.service.api.error_responses import documented
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.run_times import known_run_times
from llmprune.service.monitoring.run_progress import RunProgress, progress_of
from llmprune.service.monitoring.usage import JobUse, read_usage

router = APIRouter(prefix="/v1/jobs/{job}", tags=["jobs"])


@router.get("/progress", responses=documented(404, 422))
def job_progress(job: JobId, service: TheService, *, caller: TheCaller) -> RunProgress:
    """Show the steps of a job's run as a timeline, the time left, the throughput, and its place in the queue."""
    return live_progress(service, service.job(job, caller))


@router.get("/usage", responses=documented(404, 422))
def job_usage(job: JobId, service: TheService, *, caller: TheCaller) -> JobUse:
    """Show processors, memory, GPUs and disk that a job has used over time."""
    return live_use(service, service.job(job, caller))


def live_progress(service: Service, job: Job) -> RunProgress:
    """Return the progress of a job."""
    earlier = None if job.ended else known_run_times(service.database, [job]).get(job.id)
    progress = progress_of(job, service.settings.folder(job.id), earlier=earlier, queue=service.queue_board.place(job))
    steps = [step.model_copy(update={"name": service.paths.hide(step.name)}) for step in progress.steps]
    return progress.model_copy(update={"steps": steps})


def live_use(service: Service, job: Job) -> JobUse:
    """Return what a job has used of the machine."""
    usage, settings = read_usage(service.settings.folder(job.id)), service.settings
    limit = settings.memory_limit and settings.memory_limit * max(1, job.gpus)
    return JobUse(every=usage.every, samples=list(usage.samples), memory_limit=limit, disk_quota=settings.disk_quota)
