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
from typing import Any, Literal

import httpx2 as httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.supervisor.launchers.base import GONE, RETURNED, RUNNING, UNKNOWN, WAITING, Launch, Look
from llmprune.service.supervisor.processes import MARK

logger = logging.getLogger(__name__)

# Seconds: the supervisor waits for each answer, so few are asked for, and a silent cluster is left alone for a while.
_TIMEOUT = httpx.Timeout(5.0, connect=3.0)
_SUBMITTING = httpx.Timeout(30.0, connect=3.0)  # Ray answers when it has made an actor: a busy head takes its time
_LOOK_EVERY = 2.0
_SILENCE = 10.0
_CLEAN = (sys.executable, "-m", "llmprune.service.environment")
_START_TIMEOUT = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"  # 15 minutes in Ray's queue


class _Details(BaseModel):
    """What Ray says of a job, as far as it is used."""

    model_config = ConfigDict(extra="ignore", strict=True)

    status: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    driver_exit_code: int | None = Field(None, ge=-255, le=255)
    error_type: str | None = None
    message: str | None = None


class Ray:
    """One Ray job an attempt, under an id that job and attempt give: so it is found again after a restart.

    Ray gives a job up that has waited for 15 minutes, so only one waits there at a time; the others
    stay in the service's queue, in its order.
    """

    on_this_machine = False

    def __init__(
        self, address: str, command: Sequence[str], *, grace: float, transport: httpx.BaseTransport | None = None
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
        self._waiting.discard(name)  # also where the answer cannot be read: a job that fails must hold up no other
        found = GONE if answer.status_code == 404 else _look(launch, self._details(answer))
        if found is WAITING:
            self._waiting.add(name)
        if found in (WAITING, RUNNING):
            self._looks[name] = time.monotonic(), found
        return found

    def stop(self, launch: Launch, force: bool) -> None:
        """Have Ray end it: SIGTERM, and SIGKILL after the grace, with ``force`` or without.

        Ray does not stop a job that waits there; the note has it end by itself as soon as it is started.
        """
        if force:  # it may be given up, and is looked at again if not
            self._waiting.discard(_id(launch))
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
        """The answer; None where there is none, it is not of Ray's job API, or the cluster wants another token."""
        if self._silent_until is not None and time.monotonic() < self._silent_until:
            return None
        try:
            answer = self._http.request(method, path, **request)
            wrong = _not_ray(answer)
        except (httpx.TransportError, httpx.DecodingError) as error:
            wrong = str(error)
        if wrong and self._silent_until is None:
            logger.warning("the Ray cluster at %s does not answer (%s); its jobs wait", self.address, wrong)
        self._silent_until = time.monotonic() + _SILENCE if wrong else None
        return None if wrong else answer

    def _details(self, answer: httpx.Response) -> _Details:
        """What an answer says of a job. Raises LLMPruneError where that is no state of a job."""
        try:
            return _Details.model_validate(answer.json())
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            place = ".".join(map(str, wrong["loc"])) or "the answer"
            raise LLMPruneError(
                f"the Ray cluster at {self.address} answers what is no state of a job ({place}: {wrong['msg']}); "
                "check its version and --ray"
            ) from error


def _not_ray(answer: httpx.Response) -> str:
    """Why an answer is not one of Ray's job API, with the remedy; empty where it may be one."""
    if answer.status_code in (401, 403):
        return "set RAY_AUTH_TOKEN to its token"
    if answer.is_redirect:
        return f"it redirects to {answer.headers.get('Location', 'another address')[:200]}; give that address as --ray"
    if answer.is_success:
        try:
            answer.json()
        except (ValueError, RecursionError):
            kind = answer.headers.get("Content-Type", "text of no kind")[:80]
            return f"it answers {kind} where JSON is due; give the address of Ray's dashboard as --ray"
    return ""


def _id(launch: Launch) -> str:
    return f"llmprune-{launch.job}-{launch.attempt}"


def _note(launch: Launch) -> Path:
    """The file that says that an attempt is not wanted any more."""
    return launch.folder / f"attempt-{launch.attempt}.stopped"


def _look(launch: Launch, details: _Details) -> Look:
    status, code = details.status, details.driver_exit_code
    if status == "PENDING":
        return Look("ended") if _note(launch).exists() else WAITING
    if status == "RUNNING":
        return RUNNING
    if details.error_type == _START_TIMEOUT:
        return RETURNED
    if status == "FAILED" and code is None:  # it never ran, or its node is gone: only Ray knows why
        with launch.log.open("a", encoding="utf-8") as log:
            log.write(f"llmprune: Ray: {_last_line(details.message or 'the job failed')}\n")
        return Look("ended", 1)
    return Look("ended", 0 if status == "SUCCEEDED" else code)


def _last_line(text: str) -> str:
    """What a traceback comes to."""
    return (text.strip().splitlines() or ["no reason was given"])[-1][:500]
