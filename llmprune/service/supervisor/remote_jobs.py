"""Jobs on other machines: nodes that are lost, GPUs that no node has, files that are not in the artefact store yet."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from llmprune.results.formatting import plural
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.other_machines import node_gpus, note_lost_node, write_node_gpus
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import Launcher
from llmprune.service.supervisor.lent_files import LentFiles

logger = logging.getLogger(__name__)


class RemoteJobs:
    """Work of the supervisor for the jobs of launchers that use other machines."""

    def __init__(self, settings: Settings, jobs: JobStore, *, launchers: Mapping[str, Launcher]) -> None:
        self._settings, self._jobs = settings, jobs
        self._launchers = {name: launcher for name, launcher in launchers.items() if not launcher.on_this_machine}
        self._lent = LentFiles(settings, jobs, remote=self._launchers)

    def look_at_machines(self) -> None:
        """Record the GPUs of each cluster's largest node, by which submissions are checked; remove lent files."""
        for name, launcher in self._launchers.items():
            if (gpus := launcher.node_gpus()) is not None:
                write_node_gpus(self._jobs.database, name, gpus=gpus)
        self._lent.remove_unused()

    def can_start(self, job: Job) -> bool:
        """Return whether a node can have what a job needs; a job that waits for that blocks no other, and says so."""
        step = self._reason_to_wait(job) if job.launcher in self._launchers else None
        if step is not None and job.step != step:
            self._jobs.progress(job.id, job.ran_seconds, news={"step": step})
        return step is None

    def _reason_to_wait(self, job: Job) -> str | None:
        most = node_gpus(self._jobs.database, job.launcher)
        if most is not None and job.gpus > max(most, self._settings.ray_node_gpus or 0):
            return f"waits for a node with {plural(job.gpus, 'GPU')}; the largest has {most}"
        missing = self._lent.missing(job)
        return f"waits until the files of job {missing} are in the artefact store" if missing is not None else None

    def lost(self, job: Job, machine: str, *, ran_seconds: float) -> str | None:
        """Queue a job again whose machine is lost; return why it must fail, if its machines are lost again and again.

        ``ran_seconds``: of all attempts.
        """
        error = note_lost_node(self._jobs.database, job, machine=machine)
        self._jobs.progress(job.id, round(ran_seconds, 2), news={})
        if error is None:
            logger.warning("job %s: its node %s was lost: it continues on another", job.id, machine)
            self._jobs.queue_again(job.id, step=f"its node ({machine}) was lost; it continues on another")
        return error
