"""Files that were fetched from the artefact store for jobs of this machine, removed when no job needs them."""

from __future__ import annotations

from llmprune.service.artifacts.fetch import FETCHED, remove_fetched
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.uses import jobs_in_use
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers import LAUNCHERS


class FetchedFiles:
    """Jobs whose files others may have fetched. A new supervisor finds them by a file in their folders."""

    def __init__(self, settings: Settings, jobs: JobStore) -> None:
        self._settings, self._jobs = settings, jobs
        marked = (settings.data_dir / "jobs").glob(f"*/{FETCHED}") if settings.artifacts is not None else ()
        self._candidates = {path.parent.name for path in marked}

    def note(self, job: Job) -> None:
        """Note the jobs whose files a starting job may fetch."""
        if self._settings.artifacts is not None:
            self._candidates |= {use.job for use in job.uses}

    def remove_unused(self) -> None:
        """Remove the fetched files of jobs that no other job needs."""
        for job in self._candidates - jobs_in_use(self._jobs.database) if self._candidates else ():
            found = self._jobs.get(job)
            folder = self._settings.folder(job)
            if found is not None and _ran_elsewhere(found) and (folder / FETCHED).exists():
                remove_fetched(folder)
            self._candidates.discard(job)


def _ran_elsewhere(job: Job) -> bool:
    return job.launcher in LAUNCHERS and not LAUNCHERS[job.launcher].on_this_machine
