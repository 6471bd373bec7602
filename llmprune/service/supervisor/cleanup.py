"""Clean-up of the data folder, where the operator gave a disk quota or a number of days.

Only what can be made again is deleted: partial models of runs that ended without a result, the oldest first, then
models of finished runs, the oldest first; approved and uploaded models are kept. Reports, scores, cuts and recipes are
kept, so that a run can be repeated. A model that is being pushed, or that a follow-up reads, is kept until that has
ended.

The quota also counts what jobs without a token of their own pulled from the hub. No model is deleted because of these
downloads: above the quota no job starts, and once no job runs all downloads are deleted. Weights that several jobs
share are counted once.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llmprune.service.artifacts.manifest import STORED, keep_manifest, local_manifest, without, write_manifest
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.jobs.bases import bases_in_use
from llmprune.service.jobs.database import Database
from llmprune.service.jobs.disk_use import forget_disk_use, jobs_to_measure, write_disk_use
from llmprune.service.jobs.job import ACTIVE, ENDED, FINISHED, JobQuery, JobSummary
from llmprune.service.jobs.model_rows import kept_models
from llmprune.service.jobs.other_machines import removals, removed
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import NoSuchJob
from llmprune.service.settings import Settings

PARTIAL_MODELS = ("model.partial", "dense.partial")
MODEL = "model"
_PAGE_SIZE = 500


def used_bytes(folder: Path) -> int:
    """Return the bytes that the files under a folder take on disk; a file with several links counts once."""
    total, counted = 0, set()
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                file = os.lstat(os.path.join(place, name))
            except OSError:  # deleted meanwhile
                continue
            if file.st_nlink > 1:
                if (file.st_dev, file.st_ino) in counted:
                    continue
                counted.add((file.st_dev, file.st_ino))
            total += file.st_blocks * 512
    return total


def clean_up(settings: Settings, jobs: JobStore) -> None:
    """Delete old products until the quota holds or nothing is left that may be deleted."""
    if settings.disk_quota is None and settings.keep_days is None:
        return
    _empty_trash(settings, jobs)
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


def measure_jobs(settings: Settings, jobs: JobStore) -> None:
    """Measure the folders of running jobs, and of those that have changed, for the quotas of their owners."""
    found = jobs_to_measure(jobs.database)
    measured = [(job, _bytes_of(settings.folder(job)), state, attempts) for job, state, attempts in found]
    if measured:
        write_disk_use(jobs.database, measured)


def _bytes_of(folder: Path) -> int:
    """Return the bytes of a job, in the data folder and in the artefact store."""
    return used_bytes(folder) + stored_bytes(folder)


def remove_deleted(settings: Settings, database: Database) -> None:
    """Remove the objects of deleted jobs from the artefact store; those that fail are tried again later."""
    deleted = removals(database)
    store = ArtifactStore(settings.artifacts) if settings.artifacts and deleted else None
    for job in deleted:
        if store is not None:
            store.remove_job(job)
        removed(database, job)


def over_quota(settings: Settings) -> bool:
    """Return whether the jobs take more than the quota, so that no job may start."""
    return settings.disk_quota is not None and _counted_bytes(settings) > settings.disk_quota


def _counted_bytes(settings: Settings) -> int:
    """Return the bytes of jobs and their downloads, without job table and service logs, which are never deleted."""
    stored = sum(stored_bytes(place.parent) for place in (settings.data_dir / "jobs").glob(f"*/{STORED}"))
    return used_bytes(settings.data_dir / "jobs") + used_bytes(settings.hub_home) + stored


def stored_bytes(folder: Path) -> int:
    """Return the bytes of a job's objects in the artefact store. ``folder``: of the job."""
    manifest = local_manifest(folder)
    return manifest.bytes if manifest is not None else 0


def remove_products(settings: Settings, jobs: JobStore, *, job: JobSummary) -> int:
    """Delete the model of an ended job and its partial models; return the bytes freed.

    They are moved into the trash in the transaction that marks the job, so that no follow-up can begin to read them
    meanwhile, and a service that is killed deletes them when it starts again.
    """
    names = (*PARTIAL_MODELS, MODEL)
    places = [place for name in names if (place := settings.run_folder(job.id) / name).is_dir()]
    trash = settings.trash / job.id
    if not places and not _stored_products(settings, job):
        return 0

    def move_away() -> None:
        trash.mkdir(parents=True, exist_ok=True)
        for place in places:
            place.rename(trash / place.name)

    if not jobs.clean(job.id, move_away):
        return 0
    freed = _remove_stored(settings, job)
    forget_disk_use(jobs.database, job.id)
    freed += _own_bytes(trash)
    shutil.rmtree(trash, ignore_errors=True)
    return freed


def _stored_products(settings: Settings, job: JobSummary) -> dict[str, int]:
    """Return the objects of a job's model in the artefact store, with their bytes."""
    before = local_manifest(settings.folder(job.id)) if settings.artifacts else None
    if before is None:
        return {}
    left = without(before, (*PARTIAL_MODELS, MODEL))
    return {key: size for key, size in before.objects.items() if key not in left.objects}


def _remove_stored(settings: Settings, job: JobSummary) -> int:
    """Remove the model of an ended job from the artefact store; return the bytes freed."""
    folder, dropped = settings.folder(job.id), _stored_products(settings, job)
    before = local_manifest(folder)
    if dropped and before is not None and settings.artifacts is not None:
        store, left = ArtifactStore(settings.artifacts), without(before, (*PARTIAL_MODELS, MODEL))
        write_manifest(store, job.id, manifest=left)
        keep_manifest(folder, left)
        store.remove([*dropped])
    return sum(dropped.values())


def _empty_trash(settings: Settings, jobs: JobStore) -> None:
    """Delete what a clean-up that was killed has left, and mark its jobs."""
    for place in settings.trash.iterdir() if settings.trash.is_dir() else ():
        with suppress(NoSuchJob):
            jobs.clean(place.name, lambda: None)
        shutil.rmtree(place, ignore_errors=True)


def _own_bytes(folder: Path) -> int:
    """Return the bytes of the files under a folder that no other job shares."""
    files = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return sum(file.st_blocks * 512 for file in files if file.st_nlink == 1)


def _ended(jobs: JobStore) -> list[JobSummary]:
    found: list[JobSummary] = []
    kept = jobs.in_use() | kept_models(jobs.database) | bases_in_use(jobs.database)
    query = JobQuery(viewer=None, states=ENDED, limit=_PAGE_SIZE)
    while True:
        page = jobs.page(query)
        found += [job for job in page.jobs if not job.cleaned and job.id not in kept]
        if page.next is None:
            return found
        query = replace(query, before=page.next)
