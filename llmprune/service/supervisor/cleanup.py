"""Clean-up of the data folder, where the operator gave a disk quota or a number of days.

Only what can be made again is deleted: partial models of runs that ended without a result, the oldest first, then
models of finished runs, the oldest first; approved and uploaded models are kept. Reports, scores, cuts and recipes are
kept, so that a run can be repeated.

The quota also counts what jobs without a token of their own pulled from the hub. No model is deleted because of these
downloads: above the quota no job starts, and once no job runs all downloads are deleted.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from llmprune.service.jobs.job import ACTIVE, ENDED, FINISHED, JobQuery, JobSummary
from llmprune.service.jobs.model_rows import kept_models
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings

PARTIAL_MODELS = ("model.partial", "dense.partial")
MODEL = "model"
_PAGE_SIZE = 500


def used_bytes(folder: Path) -> int:
    """Return the bytes that the files under a folder take on disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # deleted meanwhile
                continue
    return total


def clean_up(settings: Settings, jobs: JobStore) -> None:
    """Delete old products until the quota holds or nothing is left that may be deleted."""
    if settings.disk_quota is None and settings.keep_days is None:
        return
    ended = sorted(_ended(jobs), key=lambda job: (job.state in FINISHED, job.finished or 0.0))
    if settings.keep_days is not None:
        limit = time.time() - settings.keep_days * 86_400
        for job in ended:
            if (job.finished or 0.0) < limit:
                remove_products(settings, jobs, job=job)
    if settings.disk_quota is None:
        return
    used, pulled = _counted_bytes(settings), used_bytes(settings.hub_home)
    for job in ended:
        if used - pulled <= settings.disk_quota:
            break
        used -= remove_products(settings, jobs, job=job)
    if used > settings.disk_quota and not jobs.in_states(*ACTIVE):
        shutil.rmtree(settings.hub_home, ignore_errors=True)


def over_quota(settings: Settings) -> bool:
    """Return whether the jobs take more than the quota, so that no job may start."""
    return settings.disk_quota is not None and _counted_bytes(settings) > settings.disk_quota


def _counted_bytes(settings: Settings) -> int:
    """Return the bytes of jobs and their downloads, without job table and service logs, which are never deleted."""
    return used_bytes(settings.data_dir / "jobs") + used_bytes(settings.hub_home)


def remove_products(settings: Settings, jobs: JobStore, *, job: JobSummary) -> int:
    """Delete the model of an ended job and its partial models; return the bytes freed."""
    freed = 0
    for name in (*PARTIAL_MODELS, MODEL):
        place = settings.run_folder(job.id) / name
        if place.is_dir():
            freed += used_bytes(place)
            shutil.rmtree(place, ignore_errors=True)
    if freed:
        jobs.cleaned(job.id)
    return freed


def _ended(jobs: JobStore) -> list[JobSummary]:
    found: list[JobSummary] = []
    kept = jobs.pushed() | kept_models(jobs.database)
    query = JobQuery(viewer=None, states=ENDED, limit=_PAGE_SIZE)
    while True:
        page = jobs.page(query)
        found += [job for job in page.jobs if not job.cleaned and job.id not in kept]
        if page.next is None:
            return found
        query = replace(query, before=page.next)
