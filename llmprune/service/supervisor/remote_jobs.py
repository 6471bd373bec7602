"""Jobs on other machines: nodes that are lost, and GPUs that no node has."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from llmprune.results.formatting import plural
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.other_machines import node_gpus, note_lost_node, write_node_gpus
from llmprune.service.jobs.store import JobStore
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import Launcher

logger = logging.getLogger(__name__)


class RemoteJobs:
    """Work of the supervisor for the jobs of launchers that use other machines."""

    def __init__(self, settings: Settings, jobs: JobStore, *, launchers: Mapping[str, Launcher]) -> None:
        self._settings, self._jobs = settings, jobs
        self._launchers = {name: launcher for name, launcher in launchers.items() if not launcher.on_this_machine}

    def look_at_clusters(self) -> None:
        """Record the GPUs of each cluster's largest node, by which submissions are checked."""
        for name, launcher in self._launchers.items():
            if (gpus := launcher.node_gpus()) is not None:
                write_node_gpus(self._jobs.database, name, gpus=gpus)

    def fits(self, job: Job) -> bool:
        """Return whether some node has a job's GPUs; a job that must wait for one blocks no other, and says so."""
        if job.launcher not in self._launchers:
            return True
        most = node_gpus(self._jobs.database, job.launcher)
        if most is None or job.gpus <= max(most, self._settings.ray_node_gpus or 0):
            return True
        step = f"waits for a node with {plural(job.gpus, 'GPU')}; the largest has {most}"
        if job.step != step:
            self._jobs.progress(job.id, job.ran_seconds, news={"step": step})
        return False

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
