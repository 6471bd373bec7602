"""Jobs on a Ray cluster, through Ray's job API: https://docs.ray.io/en/latest/cluster/running-applications/job-submission/

The nodes have llmprune installed in the same place as the service. They see the service's data folder at the same
path, or they reach the artefact store. Each job asks for a CPU and its GPUs, so that Ray places it on any one node that
has them, and not always on the head node.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Self

import httpx2 as httpx

from llmprune.common.errors import DiskError, LLMPruneError
from llmprune.service.artifacts.mirror import Mirror
from llmprune.service.artifacts.node import NodeTask
from llmprune.service.artifacts.publisher import recipe_key, stop_key
from llmprune.service.artifacts.store import ArtifactStore, StoreUnreachable
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
    NotNow,
)
from llmprune.service.supervisor.launchers.ray_api import (
    DEFAULT_TIMING,
    SUBMIT_TIMEOUT,
    Details,
    RayApi,
    RayTiming,
    last_line,
)
from llmprune.service.supervisor.processes import MARK

_NODE = (sys.executable, "-m", "llmprune.service.artifacts.node")
_START_TIMEOUT = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"  # after 15 minutes in Ray's queue
_ACTOR_ENDED = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")  # with its node, or alone
_NO_AGENT = "No available agent"  # in Ray's answer while its nodes start
_UPLOAD_SECONDS = 60  # that a stopped job may take to publish what it has
_STORE_PAUSE = 10.0  # seconds after a failed request to the artefact store


class Ray(Launcher):
    """One Ray job for each attempt. Its id consists of job id and attempt number: so it is found after a restart.

    Ray gives up a job that has waited for 15 minutes. Therefore only one job waits in Ray's queue at a time; the others
    wait in the service's queue, in its order. With a ``store`` the nodes need no shared data folder.
    """

    on_this_machine: ClassVar[bool] = False
    gpu_host: ClassVar[str] = "the largest node of the cluster"

    def __init__(
        self,
        address: str,
        command: Sequence[str],
        *,
        grace: float,
        timing: RayTiming = DEFAULT_TIMING,
        transport: httpx.BaseTransport | None = None,
        store: ArtifactStore | None = None,
    ) -> None:
        self.command, self.grace, self.timing, self.store = tuple(command), grace, timing, store
        self._api = RayApi(address, timing=timing, transport=transport)
        self._mirror = Mirror(store) if store is not None else None
        self._waiting: set[str] = set()
        self._given_up: set[str] = set()  # attempts whose last files are no longer waited for
        self._polled: dict[str, tuple[float, AttemptState]] = {}  # time and state of unfinished jobs
        self._gpus: tuple[float, int | None] = (float("-inf"), None)  # time and answer of node_gpus

    @classmethod
    def is_offered(cls, settings: Settings) -> bool:
        """Return whether the operator named a cluster."""
        return bool(settings.ray)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Make the launcher of the operator's cluster."""
        assert settings.ray, "offered"
        store = ArtifactStore(settings.artifacts, pause=_STORE_PAUSE) if settings.artifacts else None
        return cls(settings.ray, settings.command, grace=settings.grace, store=store)

    def capacity(self) -> int:
        """Return 1, or 0 while a job waits in Ray's queue or the cluster or the store cannot be reached."""
        if self._waiting or (self._mirror is not None and not self._mirror.is_answering()):
            return 0
        return int(self._api.ask("GET", "/api/version") is not None)

    def node_gpus(self) -> int | None:
        """Return the GPUs of the largest living node, some seconds old; None where the cluster does not list them."""
        when, known = self._gpus
        if time.monotonic() - when > self.timing.nodes_every:
            nodes = self._api.nodes()
            alive = [node.gpus for node in nodes.values() if node.is_alive] if nodes else []
            known = max(alive) if alive else known
            self._gpus = time.monotonic(), known
        return known

    def start(self, launch: Launch) -> None:
        """Submit the attempt to Ray. Where the answer is lost, the next poll shows whether the request arrived."""
        try:
            launch.working_dir.mkdir(parents=True, exist_ok=True)
            recipe = (launch.folder / "recipe.yaml").read_bytes() if self.store is not None else b""
        except OSError as error:
            raise DiskError(f"job {launch.job} cannot be started in {launch.folder}: {error}") from error
        if self.store is not None:
            try:
                self.store.write(recipe_key(launch.job), recipe)
            except StoreUnreachable as error:
                raise NotNow("waits for the artefact store") from error
        patience = math.ceil(self.grace) + (_UPLOAD_SECONDS if self.store is not None else 0)
        variables = {
            MARK: launch.job,
            "RAY_JOB_STOP_WAIT_TIME_S": str(patience),  # between its SIGTERM and its SIGKILL; Ray reads a whole number
            **({} if launch.gpus else {"CUDA_VISIBLE_DEVICES": ""}),  # Ray sets it only for jobs that ask for GPUs
        }
        body = {
            "submission_id": _id(launch),
            "entrypoint": shlex.join((*_NODE, self._task(launch).model_dump_json())),
            "entrypoint_num_cpus": 1,
            "entrypoint_num_gpus": launch.gpus,
            "runtime_env": {"env_vars": variables},
            "metadata": {"job_name": f"llmprune {launch.job}"},
        }
        answer = self._api.ask("POST", "/api/jobs/", json=body, timeout=SUBMIT_TIMEOUT)
        if answer is not None and answer.is_error and _NO_AGENT in answer.text:
            self._api.rest()
            raise NotNow("waits for the cluster, whose nodes are starting")
        if answer is not None and answer.is_error:
            raise LLMPruneError(f"the Ray cluster at {self._api.address} refused the job: {last_line(answer.text)}")
        self._waiting.add(_id(launch))

    def poll(self, launch: Launch) -> AttemptState:
        """Return the state of an attempt, at most ``poll_every`` seconds old while it is unfinished."""
        name = _id(launch)
        when, last = self._polled.pop(name, (float("-inf"), UNKNOWN))
        if time.monotonic() - when < self.timing.poll_every:
            self._polled[name] = when, last
            return last
        answer = self._api.ask("GET", f"/api/jobs/{name}")
        if answer is None or (answer.is_error and answer.status_code != 404):
            return UNKNOWN
        self._waiting.discard(name)  # also where the answer cannot be read: a job that fails must not block others
        state = GONE if answer.status_code == 404 else self._state(launch, self._api.details(answer))
        state = self._with_files(launch, state)
        if state is WAITING:
            self._waiting.add(name)
        if state is WAITING or state is RUNNING:
            self._polled[name] = time.monotonic(), state
        return state

    def stop(self, launch: Launch, force: bool) -> None:
        """Have Ray send SIGTERM, and SIGKILL after the grace, with ``force`` or without.

        Ray does not stop a job in its queue. The stop file makes such a job end as soon as it starts.
        """
        if force:  # the job may be given up; a later poll adds it again if it still waits
            self._waiting.discard(_id(launch))
            self._given_up.add(_id(launch))
        with suppress(OSError):  # a full disk: Ray is asked again after the grace
            _stop_file(launch).touch()
        if self.store is not None:
            with suppress(StoreUnreachable):
                self.store.write(stop_key(launch.job, launch.attempt), b"stop")
        self._api.ask("POST", f"/api/jobs/{_id(launch)}/stop")

    def _task(self, launch: Launch) -> NodeTask:
        """Return the task of a node. The run's output goes into the job's log, not into Ray's."""
        return NodeTask(
            job=launch.job,
            attempt=launch.attempt,
            data_dir=str(launch.folder.parents[1]),
            command=(*self.command, *launch.arguments),
            environment={**launch.environment, "LLMPRUNE_DURABLE_SNAPSHOTS": "1"},
            keep_hub=launch.keep_hub,
            log_limit=launch.log_limit,
            store=self.store.url if self.store is not None else None,
            uses=launch.uses,
        )

    def _state(self, launch: Launch, details: Details) -> AttemptState:
        status, code = details.status, details.driver_exit_code
        if status == "PENDING":
            return AttemptState("ended") if _stop_file(launch).exists() else WAITING
        if status == "RUNNING":
            return RUNNING
        if details.error_type == _START_TIMEOUT:
            return RETURNED
        if status == "FAILED" and code is None:
            return self._without_code(launch, details)
        return AttemptState("ended", 0 if status == "SUCCEEDED" else code)

    def _without_code(self, launch: Launch, details: Details) -> AttemptState:
        """Return the state of a job that never ran, whose node is lost, or that Ray ended: only Ray knows why."""
        if details.error_type in _ACTOR_ENDED and details.driver_node_id is not None:
            nodes = self._api.nodes()
            if nodes is None:
                return UNKNOWN
            node = nodes.get(details.driver_node_id)
            if node is None or not node.is_alive:
                return AttemptState("lost", machine=node.node_ip if node is not None else details.driver_node_id[:12])
        with launch.log.open("a", encoding="utf-8") as log:
            log.write(f"llmprune: Ray: {last_line(details.message or 'the job failed')}\n")
        return AttemptState("ended", 1)

    def _with_files(self, launch: Launch, state: AttemptState) -> AttemptState:
        """Copy what the attempt has published; return running until everything of an ended attempt is copied."""
        if self._mirror is None or state.state not in ("running", "ended", "lost", "gone"):
            return state
        if state is RUNNING:
            self._mirror.refresh(launch.job, launch.attempt, folder=launch.folder)
        elif _id(launch) in self._given_up:
            self._given_up.discard(_id(launch))
            self._mirror.forget(launch.job, launch.attempt)
            return AttemptState("ended")  # whatever its code: its result is not here, and a retry fetches it
        elif not self._mirror.is_complete(launch.job, launch.attempt, folder=launch.folder):
            return AttemptState("running")  # not RUNNING, which is not asked for again for a while
        return state


def _id(launch: Launch) -> str:
    return f"llmprune-{launch.job}-{launch.attempt}"


def _stop_file(launch: Launch) -> Path:
    """Return the file whose presence keeps an attempt from starting."""
    return launch.folder / f"attempt-{launch.attempt}.stopped"
