"""Jobs on a Ray cluster, through Ray's job API: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/

The nodes see the service's data folder at the same path, and have llmprune in the same place. The API is
called over HTTP, for Ray's own client has no time-outs: one lost packet would stop the supervision of all jobs.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx

from llmprune.errors import DiskError, LLMPruneError
from llmprune.service.launchers.base import GONE, RETURNED, RUNNING, UNKNOWN, WAITING, Launch, Look
from llmprune.service.processes import MARK

logger = logging.getLogger(__name__)

# Seconds: the supervisor waits for each answer, so few are asked for, and a silent cluster is left alone for a while.
_TIMEOUT = httpx.Timeout(5.0, connect=3.0)
_SUBMITTING = httpx.Timeout(30.0, connect=3.0)  # Ray answers when it has made an actor: a busy head takes its time
_LOOK_EVERY = 2.0
_SILENCE = 10.0
_CLEAN = (sys.executable, "-m", "llmprune.service.environment")
_START_TIMEOUT = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"  # 15 minutes in Ray's queue


class Ray:
    """One Ray job an attempt, under an id that job and attempt give: so it is found again after a restart.

    Ray gives a job up that has waited for 15 minutes, so only one waits there at a time; the others
    stay in the service's queue, in its order.
    """

    on_this_machine = False

    def __init__(
        self, address: str, command: Sequence[str], grace: float, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.address, self.command, self.grace = address.rstrip("/"), tuple(command), grace
        token = os.environ.get("RAY_AUTH_TOKEN")  # of clusters that ask for one
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=_TIMEOUT, transport=transport)
        self._waiting: set[str] = set()
        self._looks: dict[str, tuple[float, Look]] = {}  # of jobs that are under way, and when
        self._silent_until: float | None = None

    def room(self) -> int:
        """One more, unless one waits already or the cluster cannot be reached."""
        return int(not self._waiting and self._ask("GET", "/api/version") is not None)

    def start(self, launch: Launch) -> None:
        """Hand the attempt over. Where the answer is lost, the next look settles whether it arrived."""
        try:
            (launch.folder / "nowhere").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"job {launch.job} cannot be started in {launch.folder}: {error}") from error
        variables = {
            MARK: launch.job,
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.grace),  # between its SIGTERM and its SIGKILL
            **({} if launch.gpus else {"CUDA_VISIBLE_DEVICES": ""}),  # which Ray sets only for those who ask for GPUs
        }
        body = {
            "submission_id": _id(launch),
            "entrypoint": self._entrypoint(launch),
            "entrypoint_num_cpus": 1,
            "entrypoint_num_gpus": launch.gpus,
            "runtime_env": {"env_vars": variables},
            "metadata": {"job_name": f"llmprune {launch.job}"},
        }
        answer = self._ask("POST", "/api/jobs/", json=body, timeout=_SUBMITTING)
        if answer is not None and answer.is_error:
            raise LLMPruneError(f"the Ray cluster at {self.address} refused the job: {_last_line(answer.text)}")
        self._waiting.add(_id(launch))

    def look(self, launch: Launch) -> Look:
        """What Ray says of it."""
        name = _id(launch)
        when, last = self._looks.pop(name, (float("-inf"), UNKNOWN))
        if time.monotonic() - when < _LOOK_EVERY:
            self._looks[name] = when, last
            return last
        answer = self._ask("GET", f"/api/jobs/{name}")
        if answer is None or (answer.is_error and answer.status_code != 404):
            return UNKNOWN
        found = GONE if answer.status_code == 404 else _look(launch, answer.json())
        (self._waiting.add if found is WAITING else self._waiting.discard)(name)
        if found in (WAITING, RUNNING):
            self._looks[name] = time.monotonic(), found
        return found

    def stop(self, launch: Launch, force: bool) -> None:
        """Have Ray end it: SIGTERM, and SIGKILL after the grace; ``force`` adds nothing to that.

        Ray does not stop a job that waits there; the note has it end by itself as soon as it is started.
        """
        del force
        with suppress(OSError):  # a full disk: Ray is asked again after the grace
            _note(launch).touch()
        self._ask("POST", f"/api/jobs/{_id(launch)}/stop")

    def _entrypoint(self, launch: Launch) -> str:
        """A shell line. What the run prints goes into its own log, which Ray does not keep.

        The node's environment is not the service's, so the node itself takes its credentials out.
        """
        note, nowhere, log = (shlex.quote(str(path)) for path in (_note(launch), launch.folder / "nowhere", launch.log))
        given = (f"{name}={value}" for name, value in launch.environment.items())
        clean = (*_CLEAN, "--keep-hub" if launch.keep_hub else "--drop-hub", *given, "--")
        run = shlex.join((*clean, *self.command, *launch.arguments))
        return f"test ! -e {note} && cd {nowhere} && exec {run} >> {log} 2>&1"

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer; None where there is none, or the cluster wants another token."""
        if self._silent_until is not None and time.monotonic() < self._silent_until:
            return None
        try:
            answer = self._http.request(method, path, **request)
            wrong = "set RAY_AUTH_TOKEN to its token" if answer.status_code in (401, 403) else ""
        except httpx.TransportError as error:
            wrong = str(error)
        if wrong and self._silent_until is None:
            logger.warning("the Ray cluster at %s does not answer (%s); its jobs wait", self.address, wrong)
        self._silent_until = time.monotonic() + _SILENCE if wrong else None
        return None if wrong else answer


def _id(launch: Launch) -> str:
    return f"llmprune-{launch.job}-{launch.attempt}"


def _note(launch: Launch) -> Path:
    """The file that says that an attempt is not wanted any more."""
    return launch.folder / f"attempt-{launch.attempt}.stopped"


def _look(launch: Launch, details: dict[str, Any]) -> Look:
    status, code = details["status"], details.get("driver_exit_code")
    if status == "PENDING":
        return Look("ended") if _note(launch).exists() else WAITING
    if status == "RUNNING":
        return RUNNING
    if details.get("error_type") == _START_TIMEOUT:
        return RETURNED
    if status == "FAILED" and code is None:  # it never ran, or its node is gone: only Ray knows why
        with launch.log.open("a", encoding="utf-8") as log:
            log.write(f"llmprune: Ray: {_last_line(details.get('message') or 'the job failed')}\n")
        return Look("ended", 1)
    return Look("ended", 0 if status == "SUCCEEDED" else code)


def _last_line(text: str) -> str:
    """What a traceback comes to."""
    return (text.strip().splitlines() or ["no reason was given"])[-1][:500]
