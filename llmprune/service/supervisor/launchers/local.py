"""Jobs as processes of this machine, each in a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Self

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.artifacts.fetch import FetchTask
from llmprune.service.environment import inherited
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import GONE, RUNNING, AttemptState, Launch, Launcher
from llmprune.service.supervisor.processes import MARK, is_leased, leased, processes_of_job, signal_all

_FETCH = (sys.executable, "-m", "llmprune.service.artifacts.fetch")
_JOB_RUNNER = (sys.executable, "-m", "llmprune.service.supervisor.job_runner")


class Local(Launcher):
    """One process for each job, and its children."""

    def __init__(self, command: Sequence[str], store: str | None = None) -> None:
        self.command, self.store = tuple(command), store
        self._started: list[subprocess.Popen[bytes]] = []

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the launcher with the service's command of llmprune."""
        return cls(settings.command, settings.artifacts)

    def command_of(self, launch: Launch) -> tuple[str, ...]:
        """Return the command line of an attempt."""
        return (*self.command, *launch.arguments)

    def start(self, launch: Launch) -> None:
        """Start the attempt under a lease that its job runner holds as long as it lives."""
        try:
            launch.working_dir.mkdir(parents=True, exist_ok=True)
            with leased(launch.folder) as lease, launch.log.open("ab") as log:
                if lease is None:
                    raise LLMPruneError(f"job {launch.job} has a process already")
                job_runner = (*_JOB_RUNNER, str(launch.exit_file), str(lease.fileno()))
                process = subprocess.Popen(
                    (*job_runner, *self._whole_command(launch)),
                    cwd=launch.working_dir,
                    env=self._environment(launch),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lease.fileno(),),
                )
        except OSError as error:
            raise DiskError(f"job {launch.job} cannot be started in {launch.folder}: {error}") from error
        self._started.append(process)

    def poll(self, launch: Launch) -> AttemptState:
        """Return running while the lease is held, then ended with the code in the exit file."""
        self._started = [process for process in self._started if process.poll() is None]  # reaps zombies
        if is_leased(launch.folder):
            return RUNNING
        try:
            return AttemptState("ended", int(launch.exit_file.read_text(encoding="ascii")))
        except (OSError, ValueError):
            return RUNNING if self._kill_orphans(launch) else GONE

    def stop(self, launch: Launch, force: bool) -> None:
        """Send SIGTERM, or with ``force`` SIGKILL, to every process of the job."""
        signal_all(launch.job, signal.SIGKILL if force else signal.SIGTERM)

    def _whole_command(self, launch: Launch) -> tuple[str, ...]:
        """Return the command line, behind a program that fetches what the attempt needs and only the store has."""
        command = self.command_of(launch)
        if self.store is None or not launch.uses:
            return command
        task = FetchTask(
            store=self.store,
            data_dir=str(launch.folder.parents[1]),
            uses=launch.uses,
            command=command,
            environment=_own_variables(launch),
            keep_hub=launch.keep_hub,
        )
        return (*_FETCH, task.model_dump_json())

    def _environment(self, launch: Launch) -> Mapping[str, str]:
        """Return the environment of an attempt; the program that fetches removes the store's credentials itself."""
        if self.store is not None and launch.uses:
            return {**os.environ, **_own_variables(launch)}
        return inherited(os.environ, launch.keep_hub) | _own_variables(launch)

    def _kill_orphans(self, launch: Launch) -> bool:
        """Kill the processes of a job whose job runner has died; return whether there were any."""
        if not processes_of_job(launch.job):
            return False
        signal_all(launch.job, signal.SIGKILL)
        return True


def _own_variables(launch: Launch) -> dict[str, str]:
    return {MARK: launch.job, "CUDA_VISIBLE_DEVICES": ",".join(launch.devices), **launch.environment}
