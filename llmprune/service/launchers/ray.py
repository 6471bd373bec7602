"""Jobs on a Ray cluster, through Ray's job API: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/

The data directory must lie where the cluster's machines see it under the same path, and llmprune
must be installed there for the same Python.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmprune.errors import DiskError, LLMPruneError
from llmprune.service.launchers.base import GONE, RUNNING, Launch, Look
from llmprune.service.processes import MARK

_EVERY = 2.0  # seconds between two questions about the same job


class Ray:
    """One Ray job an attempt, with the GPUs that the job asks for."""

    on_this_machine = False

    def __init__(self, command: Sequence[str], address: str) -> None:
        self.command = tuple(command)
        self.address = address
        self._asked: dict[str, tuple[float, Look]] = {}

    def start(self, launch: Launch) -> None:
        """Submit the attempt, unless a service that died did so already."""
        nowhere = launch.folder / "nowhere"
        try:
            nowhere.mkdir(parents=True, exist_ok=True)
            launch.log.touch()
            _offset_file(launch).write_text(str(launch.log.stat().st_size), encoding="ascii")
        except OSError as error:
            raise DiskError(f"job {launch.job} cannot be started in {launch.folder}: {error}") from error
        entrypoint = f"cd {shlex.quote(str(nowhere))} && exec {shlex.join((*self.command, *launch.arguments))}"
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=_name(launch),
                runtime_env={"env_vars": {MARK: launch.job, **launch.environment}},
                entrypoint_num_gpus=launch.gpus or None,
                entrypoint_num_cpus=1,
            )
        except (RuntimeError, ConnectionError) as error:
            if "already exists" not in str(error):
                raise LLMPruneError(f"Ray at {self.address} does not take the job: {error}") from error

    def look(self, launch: Launch) -> Look:
        """Ray's word; while the cluster cannot be reached, the job counts as running."""
        asked, known = self._asked.get(_name(launch), (0.0, RUNNING))
        if time.monotonic() - asked < _EVERY:
            return known
        found = self._look(launch)
        self._asked[_name(launch)] = (time.monotonic(), found)
        return found

    def stop(self, launch: Launch, force: bool) -> None:
        """Have Ray end it: Ray itself sends SIGTERM, then SIGKILL."""
        del force
        try:
            self._client.stop_job(_name(launch))
        except (RuntimeError, ConnectionError):
            return  # asked again at the next look

    def _look(self, launch: Launch) -> Look:
        try:
            info = self._client.get_job_info(_name(launch))
            self._fetch_log(launch)
        except ConnectionError:
            return RUNNING
        except RuntimeError as error:
            return GONE if "does not exist" in str(error) else RUNNING
        if not info.status.is_terminal():
            return RUNNING
        codes = {"SUCCEEDED": 0, "STOPPED": 143}
        code = codes.get(info.status.value, info.driver_exit_code)
        return Look("ended", code) if code is not None else GONE

    def _fetch_log(self, launch: Launch) -> None:
        """Write what the attempt has said so far after what earlier ones said."""
        said = self._client.get_job_logs(_name(launch)).encode()
        try:
            offset = int(_offset_file(launch).read_text(encoding="ascii"))
            with launch.log.open("r+b") as log:
                log.seek(offset)
                log.write(said)
                log.truncate()
        except (OSError, ValueError):
            return  # the next look tries again

    @cached_property
    def _client(self) -> Any:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise LLMPruneError("Ray is not installed; install it with: pip install 'llmprune[ray]'") from error
        return JobSubmissionClient(self.address)


def _name(launch: Launch) -> str:
    return f"llmprune-{launch.job}-{launch.attempt}"


def _offset_file(launch: Launch) -> Path:
    return launch.folder / f"attempt-{launch.attempt}.offset"
