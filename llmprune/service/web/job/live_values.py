"""Values of the parts of a job's page that show its progress, its use of the machine and its notifications."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llmprune.service.api.dependencies import Service
from llmprune.service.api.jobs.live import live_progress, live_use
from llmprune.service.api.jobs.notifications import notifications_of
from llmprune.service.jobs.job import Job, JobSummary
from llmprune.service.monitoring.queue_estimate import QueuePlace
from llmprune.service.monitoring.run_progress import RunProgress
from llmprune.service.supervisor.launchers import remote_launchers
from llmprune.service.users.tokens import Caller
from llmprune.service.web.job.run_charts import histories, timeline_rows


def live_values(service: Service, job: Job) -> dict[str, Any]:
    """Return the values of the progress."""
    progress = live_progress(service, job)
    step = next((one.words for one in progress.steps if one.state == "current"), job.step)
    return {"progress": progress, "rows": timeline_rows(progress), "share": _share(job, progress), "step": step}


def _share(job: Job, progress: RunProgress) -> float:
    """Return the fraction of a job that is done: of its time where the rest is known, else of its steps."""
    left = progress.left
    if left is None or left.seconds is None or left.kind == "at least" or not job.ran_seconds:
        return job.fraction
    return job.ran_seconds / (job.ran_seconds + left.seconds)


def places_of(service: Service, jobs: Iterable[JobSummary]) -> dict[str, QueuePlace]:
    """Return the places of the jobs that wait, by id."""
    found = {job.id: service.queue_board.place(job) for job in jobs}
    return {job: place for job, place in found.items() if place is not None}


def usage_values(service: Service, job: Job) -> dict[str, Any]:
    """Return the values of the use of the machine."""
    elsewhere = job.launcher in remote_launchers(service.settings)
    return {"usage": histories(live_use(service, job)), "elsewhere": elsewhere}


def notification_values(service: Service, job: Job, *, caller: Caller) -> dict[str, Any]:
    """Return the values of the notifications; none where the caller may not change the job."""
    if not caller.may_change(job.owner):
        return {"notified": None}
    settings = service.settings.notifications
    offered = {"webhooks": settings.webhooks != "off", "mail": settings.smtp is not None}
    saved = service.outbox.targets(job.id)
    masked = {"masked_urls": saved.masked("webhook"), "masked_emails": saved.masked("email")}
    return {"notified": notifications_of(service, job.id), **masked, **offered}
