"""Jobs as processes of this machine, each in a process group of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.environment import inherited
from llmprune.service.supervisor.launchers.base import GONE, RUNNING, Launch, Look
from llmprune.service.supervisor.processes import MARK, is_leased, leased, marked, signal_all

_ATTEMPT = (sys.executable, "-m", "llmprune.service.supervisor.job_runner")


class Local:
    """One process a job (and its children)."""

    on_this_machine = True

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self._started: list[subprocess.Popen[bytes]] = []

    def command_of(self, launch: Launch) -> tuple[str, ...]:
        """What is run."""
        return (*self.command, *launch.arguments)

    def room(self) -> int:
        """Slots and GPUs say how many."""
        return 0

    def start(self, launch: Launch) -> None:
        """Start the attempt under a lease that it holds as long as it lives."""
        nowhere = launch.folder / "nowhere"
        try:
            nowhere.mkdir(parents=True, exist_ok=True)
            with leased(launch.folder) as lease, launch.log.open("ab") as log:
                if lease is None:
                    raise LLMPruneError(f"job {launch.job} has a process already")
                keeper = (*_ATTEMPT, str(launch.exit_file), str(lease.fileno()))
                process = subprocess.Popen(
                    (*keeper, *self.command_of(launch)),
                    cwd=nowhere,
                    env=_environment(launch),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(lease.fileno(),),
                )
        except OSError as error:
            raise DiskError(f"job {launch.job} cannot be started in {launch.folder}: {error}") from error
        self._started.append(process)

    def look(self, launch: Launch) -> Look:
        """Running while the lease is held; then its exit file speaks."""
        self._started = [process for process in self._started if process.poll() is None]  # no zombies stay
        if is_leased(launch.folder):
            return RUNNING
        try:
            return Look("ended", int(launch.exit_file.read_text(encoding="ascii")))
        except (OSError, ValueError):
            return RUNNING if self._lost_its_keeper(launch) else GONE

    def stop(self, launch: Launch, force: bool) -> None:
        """SIGTERM, or SIGKILL, to every process of the job."""
        signal_all(launch.job, signal.SIGKILL if force else signal.SIGTERM)

    def _lost_its_keeper(self, launch: Launch) -> bool:
        """Whether processes are left that nobody will report on; they are ended, the next look sees them gone."""
        if not marked(launch.job):
            return False
        signal_all(launch.job, signal.SIGKILL)
        return True


def _environment(launch: Launch) -> Mapping[str, str]:
    own = {MARK: launch.job, "CUDA_VISIBLE_DEVICES": ",".join(launch.devices)}
    return inherited(os.environ, launch.keep_hub) | own | dict(launch.environment)
