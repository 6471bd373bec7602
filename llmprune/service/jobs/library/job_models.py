"""Models of finished jobs, from which other jobs start: ``model.id: job://ID`` in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmprune.service.artifacts.manifest import local_manifest
from llmprune.service.jobs.job import FINISHED, SUMMARY_COLUMNS, Job, JobSummary, summary_of
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.store_reads import Term, newest
from llmprune.service.recipe_policy.allowed_paths import JOB_SCHEME
from llmprune.service.settings import Settings
from llmprune.service.users.tokens import Caller

_CONFIG = "config.json"


def finished_of_model(jobs: JobStore, model: str, *, viewer: str | None, limit: int) -> list[JobSummary]:
    """Return the finished jobs of a model that a viewer may see (None: all), the newest first."""
    terms: list[Term] = [("model = ?", [model]), (f"state IN ({', '.join('?' * len(FINISHED))})", [*FINISHED])]
    rows = jobs.database.read(*newest(f"seq, {SUMMARY_COLUMNS}", terms, viewer=viewer, limit=limit))
    return [summary_of(row) for row in rows]


@dataclass(frozen=True)
class JobModels:
    """The models that a caller may start from: those of the finished jobs that the caller may read."""

    jobs: JobStore
    settings: Settings
    caller: Caller

    def job(self, job: str) -> Job | None:
        """Return a job with a model to start from; None where there is none that the caller may read."""
        found = self.jobs.get(job)
        if found is None or not self.caller.may_read(found.owner, found.shared or self.settings.share_jobs):
            return None
        has_model = found.state in FINISHED and found.source is None and not found.cleaned
        return found if has_model and (self._is_here(job) or self.is_only_stored(job)) else None

    def is_only_stored(self, job: str) -> bool:
        """Return whether the artefact store alone has a job's model, which is fetched when another job needs it."""
        if self.settings.artifacts is None or self._is_here(job):
            return False
        manifest = local_manifest(self.settings.folder(job))
        return manifest is not None and manifest.find(f"model/{_CONFIG}") is not None

    def folder(self, job: str) -> Path | None:
        """Return the folder of a job's model, be it there or in the store; None where there is none to start from."""
        return self._folder(job) if self.job(job) else None

    def base_of(self, model: str) -> Job | None:
        """Return the job that a recipe's model names; None for any other model."""
        return self.job(model.removeprefix(JOB_SCHEME)) if model.startswith(JOB_SCHEME) else None

    def _is_here(self, job: str) -> bool:
        return (self._folder(job) / _CONFIG).is_file()

    def _folder(self, job: str) -> Path:
        return self.settings.run_folder(job).absolute() / "model"
