"""Jobs on a Ray cluster, through Ray's job API: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/

The nodes see the service's data folder at the same path, and have llmprune installed in the same place. The API is
called over HTTP, because Ray's own client has no time-outs: one lost packet would block the supervision of all jobs.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import httpx2 as httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.settings import Settings
from llmprune.service.supervisor.launchers.base import (
    GONE,
    RETURNED,
    RUNNING,
    UNKNOWN,
    WAITING,
    AttemptState,
    Launch,
    Launcher,
)
from llmprune.service.supervisor.processes import MARK

logger = logging.getLogger(__name__)

_TIMEOUT = httpx.Timeout(5.0, connect=3.0)  # seconds, for the supervisor waits for each answer
_SUBMIT_TIMEOUT = httpx.Timeout(30.0, connect=3.0)  # Ray answers once it has made an actor, slowly on a busy head
_CLEAN_ENVIRONMENT = (sys.executable, "-m", "llmprune.service.environment")
_START_TIMEOUT = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"  # after 15 minutes in Ray's queue


@dataclass(frozen=True)
class RayTiming:
    """Seconds between two requests, so that a slow cluster does not block the supervisor."""

    poll_every: float = 2.0  # for each job
    pause: float = 10.0  # after a request that was not answered


class _Details(BaseModel):
    """State of a job in an answer of Ray; fields that are not used are left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    status: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    driver_exit_code: int | None = Field(None, ge=-255, le=255)
    error_type: str | None = None
    message: str | None = None


class Ray(Launcher):
    """One Ray job for each attempt. Its id consists of job id and attempt number: so it is found after a restart.

    Ray gives up a job that has waited for 15 minutes. Therefore only one job waits in Ray's queue at a time; the others
    wait in the service's queue, in its order.
    """

    on_this_machine: ClassVar[bool] = False

    def __init__(
        self,
        address: str,
        command: Sequence[str],
        *,
        grace: float,
        timing: RayTiming = RayTiming(),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.address, self.command, self.grace, self.timing = address.rstrip("/"), tuple(command), grace, timing
        token = os.environ.get("RAY_AUTH_TOKEN")  # for clusters that require one
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=self.address, headers=headers, timeout=_TIMEOUT, transport=transport)
        self._waiting: set[str] = set()
        self._polled: dict[str, tuple[float, AttemptState]] = {}  # time and state of unfinished jobs
        self._silent_until: float | None = None

    @classmethod
    def is_offered(cls, settings: Settings) -> bool:
        """Return whether the operator named a cluster."""
        return bool(settings.ray)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the launcher of the operator's cluster."""
        assert settings.ray, "offered"
        return cls(settings.ray, settings.command, grace=settings.grace)

    def capacity(self) -> int:
        """Return 1, or 0 while a job waits in Ray's queue or the cluster cannot be reached."""
        return int(not self._waiting and self._ask("GET", "/api/version") is not None)

    def start(self, launch: Launch) -> None:
        """Submit the attempt to Ray. Where the answer is lost, the next poll shows whether the request arrived."""
        try:
            launch.working_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"job {launch.job} cannot be started in {launch.folder}: {error}") from error
        variables = {
            MARK: launch.job,
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.grace),  # between its SIGTERM and its SIGKILL
            **({} if launch.gpus else {"CUDA_VISIBLE_DEVICES": ""}),  # Ray sets it only for jobs that ask for GPUs
        }
        body = {
            "submission_id": _id(launch),
            "entrypoint": self._entrypoint(launch),
            "entrypoint_num_cpus": 1,
            "entrypoint_num_gpus": launch.gpus,
            "runtime_env": {"env_vars": variables},
            "metadata": {"job_name": f"llmprune {launch.job}"},
        }
        answer = self._ask("POST", "/api/jobs/", json=body, timeout=_SUBMIT_TIMEOUT)
        if answer is not None and answer.is_error:
            raise LLMPruneError(f"the Ray cluster at {self.address} refused the job: {_last_line(answer.text)}")
        self._waiting.add(_id(launch))

    def poll(self, launch: Launch) -> AttemptState:
        """Return the state of an attempt, at most ``poll_every`` seconds old while it is unfinished."""
        name = _id(launch)
        when, last = self._polled.pop(name, (float("-inf"), UNKNOWN))
        if time.monotonic() - when < self.timing.poll_every:
            self._polled[name] = when, last
            return last
        answer = self._ask("GET", f"/api/jobs/{name}")
        if answer is None or (answer.is_error and answer.status_code != 404):
            return UNKNOWN
        self._waiting.discard(name)  # also where the answer cannot be read: a job that fails must not block others
        state = GONE if answer.status_code == 404 else _attempt_state(launch, self._details(answer))
        if state is WAITING:
            self._waiting.add(name)
        if state in (WAITING, RUNNING):
            self._polled[name] = time.monotonic(), state
        return state

    def stop(self, launch: Launch, force: bool) -> None:
        """Have Ray send SIGTERM, and SIGKILL after the grace, with ``force`` or without.

        Ray does not stop a job in its queue. The stop file makes such a job end as soon as it starts.
        """
        if force:  # the job may be given up; a later poll adds it again if it still waits
            self._waiting.discard(_id(launch))
        with suppress(OSError):  # a full disk: Ray is asked again after the grace
            _stop_file(launch).touch()
        self._ask("POST", f"/api/jobs/{_id(launch)}/stop")

    def _entrypoint(self, launch: Launch) -> str:
        """Return the shell line of an attempt. The run's output goes into the job's log, not into Ray's.

        The node's environment differs from the service's, so the credentials are removed on the node.
        """
        paths = (_stop_file(launch), launch.working_dir, launch.log)
        stop_file, working_dir, log = (shlex.quote(str(path)) for path in paths)
        given = (f"{name}={value}" for name, value in launch.environment.items())
        clean = (*_CLEAN_ENVIRONMENT, "--keep-hub" if launch.keep_hub else "--drop-hub", *given, "--")
        run = shlex.join((*clean, *self.command, *launch.arguments))
        return f"test ! -e {stop_file} && cd {working_dir} && exec {run} >> {log} 2>&1"

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """Return the answer; None where there is none, it is no answer of Ray's job API, or the token is wrong."""
        if self._silent_until is not None and time.monotonic() < self._silent_until:
            return None
        try:
            answer = self._http.request(method, path, **request)
            wrong = _not_ray(answer)
        except (httpx.TransportError, httpx.DecodingError) as error:
            wrong = str(error)
        if wrong and self._silent_until is None:
            logger.warning("the Ray cluster at %s does not answer (%s); its jobs wait", self.address, wrong)
        self._silent_until = time.monotonic() + self.timing.pause if wrong else None
        return None if wrong else answer

    def _details(self, answer: httpx.Response) -> _Details:
        """Read a job's state from an answer. Raises LLMPruneError where it holds none."""
        try:
            return _Details.model_validate(answer.json())
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            place = ".".join(map(str, wrong["loc"])) or "the answer"
            raise LLMPruneError(
                f"the Ray cluster at {self.address} sent no state of a job ({place}: {wrong['msg']}); "
                "check its version and --ray"
            ) from error


def _not_ray(answer: httpx.Response) -> str:
    """Return why an answer is not one of Ray's job API, with the remedy; empty where it may be one."""
    if answer.status_code in (401, 403):
        return "set RAY_AUTH_TOKEN to its token"
    if answer.is_redirect:
        return f"it redirects to {answer.headers.get('Location', 'another address')[:200]}; give that address as --ray"
    if answer.is_success:
        try:
            answer.json()
        except (ValueError, RecursionError):
            kind = answer.headers.get("Content-Type", "text of no kind")[:80]
            return f"it answers {kind} instead of JSON; give the address of Ray's dashboard as --ray"
    return ""


def _id(launch: Launch) -> str:
    return f"llmprune-{launch.job}-{launch.attempt}"


def _stop_file(launch: Launch) -> Path:
    """Return the file whose presence keeps an attempt from starting."""
    return launch.folder / f"attempt-{launch.attempt}.stopped"


def _attempt_state(launch: Launch, details: _Details) -> AttemptState:
    status, code = details.status, details.driver_exit_code
    if status == "PENDING":
        return AttemptState("ended") if _stop_file(launch).exists() else WAITING
    if status == "RUNNING":
        return RUNNING
    if details.error_type == _START_TIMEOUT:
        return RETURNED
    if status == "FAILED" and code is None:  # it never ran, or its node is gone: only Ray knows why
        with launch.log.open("a", encoding="utf-8") as log:
            log.write(f"llmprune: Ray: {_last_line(details.message or 'the job failed')}\n")
        return AttemptState("ended", 1)
    return AttemptState("ended", 0 if status == "SUCCEEDED" else code)


def _last_line(text: str) -> str:
    """Return the last line of a traceback, which names the error."""
    return (text.strip().splitlines() or ["no reason was given"])[-1][:500]
