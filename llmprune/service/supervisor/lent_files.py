"""Files of jobs that ran on this machine, in the artefact store for as long as jobs on other machines need them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Container
from pathlib import Path

from llmprune.common.errors import LLMPruneError
from llmprune.service.artifacts.manifest import STORED, newest_manifest
from llmprune.service.artifacts.publisher import Publisher
from llmprune.service.artifacts.snapshot import files_in
from llmprune.service.artifacts.store import ArtifactStore
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.other_machines import lent_jobs, note_lent, returned
from llmprune.service.jobs.store import JobStore
from llmprune.service.jobs.uses import jobs_in_use
from llmprune.service.settings import Settings

logger = logging.getLogger(__name__)

_RETRY_AFTER = 10.0  # seconds after a failure


class LentFiles:
    """Uploads run folders that waiting jobs need, one at a time in a thread, and removes them afterwards.

    ``remote``: launchers whose jobs publish their files themselves.
    """

    def __init__(self, settings: Settings, jobs: JobStore, *, remote: Container[str]) -> None:
        self._settings, self._jobs, self._remote = settings, jobs, remote
        self._thread: threading.Thread | None = None
        self._failed = float("-inf")  # time.monotonic() of the last failure

    def missing(self, job: Job) -> str | None:
        """Return a job whose files the store lacks and ``job`` needs, and begin to upload them; None: it has all."""
        if self._settings.artifacts is None:
            return None
        for use in job.uses:
            lender = self._jobs.get(use.job)
            if lender is not None and lender.launcher not in self._remote and not _is_stored(self._folder(lender)):
                self._begin(lender)
                return lender.id
        return None

    def remove_unused(self) -> None:
        """Remove the files that no job needs any more. Raises StoreUnreachable."""
        lent = lent_jobs(self._jobs.database) if self._settings.artifacts is not None else []
        used = jobs_in_use(self._jobs.database) if lent else set()
        for job in lent:
            if job not in used:
                assert self._settings.artifacts is not None, "checked above"
                (self._settings.folder(job) / STORED).unlink(missing_ok=True)  # first: what it lists is going
                ArtifactStore(self._settings.artifacts).remove_job(job)
                returned(self._jobs.database, job)

    def _folder(self, job: Job) -> Path:
        return self._settings.folder(job.id).absolute()

    def _begin(self, lender: Job) -> None:
        is_busy = self._thread is not None and self._thread.is_alive()
        if is_busy or time.monotonic() - self._failed < _RETRY_AFTER:
            return
        note_lent(self._jobs.database, lender.id)
        self._thread = threading.Thread(target=self._upload, args=(lender,), daemon=True)
        self._thread.start()

    def _upload(self, lender: Job) -> None:
        assert self._settings.artifacts is not None, "checked before it was begun"
        try:
            store = ArtifactStore(self._settings.artifacts)
            publisher = Publisher(store, lender.id, lender.attempts, self._folder(lender))
            publisher.last = newest_manifest(store, lender.id)
            publisher.publish()
        except (LLMPruneError, OSError) as error:
            logger.warning("the files of job %s are not in the artefact store yet: %s; trying again", lender.id, error)
            self._failed = time.monotonic()


def _is_stored(folder: Path) -> bool:
    """Return whether a manifest of the run folder was written after its files."""
    try:
        written = (folder / STORED).stat().st_mtime_ns
        return all(path.stat().st_mtime_ns <= written for path in files_in(folder / "run"))
    except OSError:
        return False
