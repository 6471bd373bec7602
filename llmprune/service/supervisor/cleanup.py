"""Clean-up of the data folder, where the operator gave a disk quota or a number of days.

Only what can be made again is deleted: partial models of runs that ended without a result, the oldest first, then
models of finished runs, the oldest first; approved and uploaded models are kept. Reports, scores, cuts and recipes are
kept, so that a run can be repeated. A model that another job needs is kept until that job has ended.

The quota also counts what jobs without a token of their own pulled from the hub. No model is deleted because of these
downloads: above the quota no job starts, and once no job runs all downloads are deleted. Weights that several jobs
share are counted once.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from llmprune.results.run_folder.products import FULL_VOCABULARY, GGUF_FILES, QUANTIZED_MODEL, REPAIRED
from llmprune.service.artifacts.manifest import STORED, keep_manifest, local_manifest, without, write_manifest
from llmprune.service.artifacts.outline import OUTLINE
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.database.database import Database
from llmprune.service.jobs.disk_use import forget_disk_use, jobs_to_measure, write_disk_use
from llmprune.service.jobs.job import ACTIVE, FINISHED
from llmprune.service.jobs.library.model_rows import kept_models
from llmprune.service.jobs.other_machines import removals, removed
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import NoSuchJob
from llmprune.service.jobs.uses import jobs_in_use
from llmprune.service.settings import Settings

PARTIAL_MODELS = ("model.partial", "dense.partial")
MODELS = ("model", QUANTIZED_MODEL, GGUF_FILES, REPAIRED, FULL_VOCABULARY)  # a follow-up reads the first alone


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


def clean_up(settings: Settings, jobs: JobStore) -> bool:
    """Delete old products until the quota holds or nothing is left that may be deleted.

    Return whether the jobs still take more than the quota, so that no job may start.
    """
    if settings.disk_quota is None and settings.keep_days is None:
        return False
    _empty_trash(settings, jobs)
    if settings.keep_days is not None:
        for job in _removable(jobs.database, before=time.time() - settings.keep_days * 86_400):
            remove_products(settings, jobs, job=job)
    if settings.disk_quota is None:
        return False
    pulled = used_bytes(settings.hub_home)
    used = _job_bytes(settings) + pulled
    for job in _removable(jobs.database) if used - pulled > settings.disk_quota else ():
        used -= remove_products(settings, jobs, job=job)
        if used - pulled <= settings.disk_quota:
            break
    if used > settings.disk_quota and not jobs.in_states(*ACTIVE):
        shutil.rmtree(settings.hub_home, ignore_errors=True)
        used -= pulled
    return used > settings.disk_quota


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
    """Return whether the jobs and their downloads take more than the quota."""
    return (
        settings.disk_quota is not None and _job_bytes(settings) + used_bytes(settings.hub_home) > settings.disk_quota
    )


def _job_bytes(settings: Settings) -> int:
    """Return the bytes of all jobs, in the data folder and in the artefact store."""
    stored = sum(stored_bytes(place.parent) for place in (settings.data_dir / "jobs").glob(f"*/{STORED}"))
    return used_bytes(settings.data_dir / "jobs") + stored


def stored_bytes(folder: Path) -> int:
    """Return the bytes of a job's objects in the artefact store. ``folder``: of the job."""
    manifest = local_manifest(folder)
    return manifest.bytes if manifest is not None else 0


def remove_products(settings: Settings, jobs: JobStore, *, job: str) -> int:
    """Delete the model of an ended job, its other forms and its partial models; return the bytes freed.

    They are moved into the trash in the transaction that marks the job, so that no follow-up can begin to read them
    meanwhile, and a service that is killed deletes them when it starts again.
    """
    names = (*PARTIAL_MODELS, *MODELS)
    places = [place for name in names if (place := settings.run_folder(job) / name).is_dir()]
    trash = settings.trash / job
    if not places and not _stored_products(settings, job):
        return 0

    def move_away() -> None:
        trash.mkdir(parents=True, exist_ok=True)
        for place in places:
            place.rename(trash / place.name)

    if not jobs.clean(job, move_away):
        return 0
    freed = _remove_stored(settings, job)
    shutil.rmtree(settings.folder(job) / OUTLINE, ignore_errors=True)
    forget_disk_use(jobs.database, job)
    freed += _own_bytes(trash)
    shutil.rmtree(trash, ignore_errors=True)
    return freed


def _stored_products(settings: Settings, job: str) -> dict[str, int]:
    """Return the objects of a job's model in the artefact store, with their bytes."""
    before = local_manifest(settings.folder(job)) if settings.artifacts else None
    if before is None:
        return {}
    left = without(before, (*PARTIAL_MODELS, *MODELS))
    return {key: size for key, size in before.objects.items() if key not in left.objects}


def _remove_stored(settings: Settings, job: str) -> int:
    """Remove the model of an ended job from the artefact store; return the bytes freed."""
    folder, dropped = settings.folder(job), _stored_products(settings, job)
    before = local_manifest(folder)
    if dropped and before is not None and settings.artifacts is not None:
        store, left = ArtifactStore(settings.artifacts), without(before, (*PARTIAL_MODELS, *MODELS))
        write_manifest(store, job, manifest=left)
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


def _removable(database: Database, *, before: float | None = None) -> list[str]:
    """Return the ended jobs whose products may be deleted: those without a result first, then the oldest.

    ``before``: only jobs that ended before this time. Read from an index of the jobs that were not cleaned yet.
    """
    older, limit = ("", ()) if before is None else ("AND finished < ? ", (before,))
    kept = jobs_in_use(database) | kept_models(database)
    sql = (
        f"SELECT id FROM jobs WHERE cleaned = 0 AND source IS NULL AND finished IS NOT NULL {older}"
        f"ORDER BY CASE WHEN state IN ({', '.join('?' * len(FINISHED))}) THEN 1 ELSE 0 END, finished"
    )
    return [row["id"] for row in database.read(sql, (*limit, *FINISHED)) if row["id"] not in kept]
