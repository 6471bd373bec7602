"""Disk: how much the jobs take, and what goes when it is too much.

Only where the operator gave a quota or a number of days. What goes first is what can be made
again: leavings of runs that ended without a result, the oldest first, then models of finished
runs, the oldest first. Reports, scores, cuts and recipes stay, so that a run can be done again.

What jobs without a token pulled from the hub counts too. No model goes because of it: above the
quota no job starts, and once the last one has ended all that was pulled goes.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from llmprune.service.jobs.job import ACTIVE, ENDED, FINISHED, JobSummary
from llmprune.service.jobs.store import Jobs
from llmprune.service.settings import Settings

LEAVINGS = ("model.partial", "dense.partial")
MODEL = "model"
_PAGE = 500


def used_bytes(folder: Path) -> int:
    """What the files under a folder take on disk."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def clean_up(settings: Settings, jobs: Jobs) -> None:
    """Apply the rules until the quota holds or nothing is left that may go."""
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
    """Whether no more jobs should start."""
    return settings.disk_quota is not None and _counted_bytes(settings) > settings.disk_quota


def _counted_bytes(settings: Settings) -> int:
    """What jobs and their pulls take: the job table and the logs are not theirs, and no clean-up can take them."""
    return used_bytes(settings.data_dir / "jobs") + used_bytes(settings.hub_home)


def remove_products(settings: Settings, jobs: Jobs, *, job: JobSummary) -> int:
    """Take an ended job's leavings and its model; how many bytes that gave."""
    freed = 0
    for name in (*LEAVINGS, MODEL):
        place = settings.run_folder(job.id) / name
        if place.is_dir():
            freed += used_bytes(place)
            shutil.rmtree(place, ignore_errors=True)
    if freed:
        jobs.cleaned(job.id)
    return freed


def _ended(jobs: Jobs) -> list[JobSummary]:
    found: list[JobSummary] = []
    needed = jobs.pushed()
    before: int | None = None
    while True:
        page, before = jobs.page(ENDED, before=before, limit=_PAGE, viewer=None)
        found += [job for job in page if not job.cleaned and job.id not in needed]
        if before is None:
            return found
