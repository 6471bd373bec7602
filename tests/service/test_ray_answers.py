"""Answers of Ray's job API as the launcher reads them, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from helpers.service import FAKE, RECIPE, YAML, ServiceHarness, free_port, recipe

from llmprune.common.errors import LLMPruneError
from llmprune.service.supervisor.launchers.base import (
    GONE,
    RETURNED,
    RUNNING,
    UNKNOWN,
    WAITING,
    AttemptState,
    Launch,
    NotNow,
)
from llmprune.service.supervisor.launchers.ray import Ray
from llmprune.service.supervisor.launchers.ray_api import RayTiming

IMPATIENT = RayTiming(poll_every=0.0, pause=0.0)  # asks at every poll


class FakeCluster:
    """A launcher and a cluster whose answers a test sets."""

    def __init__(self, folder: Path, timing: RayTiming = IMPATIENT) -> None:
        self.answer: httpx.Response | Exception = httpx.Response(200, json={})
        self.answers: dict[str, httpx.Response] = {}  # of other paths
        self.asked: list[httpx.Request] = []
        transport = httpx.MockTransport(self._handle)
        self.ray = Ray("http://head:8265", FAKE, grace=1.0, timing=timing, transport=transport)
        self.launch = Launch("0123456789ab", 2, folder, ("run",), 1, (), {})

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if request.url.path in self.answers:
            return self.answers[request.url.path]
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def poll(self, code: int = 200, /, **details: Any) -> AttemptState:
        """Return the state that the launcher reads from an answer."""
        self.answer = httpx.Response(code, json=details)
        return self.ray.poll(self.launch)


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    """A cluster that is asked at every poll."""
    return FakeCluster(tmp_path)


def test_the_states_of_a_job_on_a_cluster(cluster: FakeCluster) -> None:
    """Each status of Ray has a state; a job that Ray gave up in its queue is returned."""
    assert cluster.poll(status="PENDING") == WAITING
    cluster.ray.stop(cluster.launch, force=False)
    assert cluster.poll(status="PENDING") == AttemptState("ended", None)  # Ray itself stops it only once it runs
    assert cluster.poll(status="RUNNING") == RUNNING
    assert cluster.poll(status="SUCCEEDED", driver_exit_code=0) == AttemptState("ended", 0)
    assert cluster.poll(status="FAILED", driver_exit_code=3) == AttemptState("ended", 3)
    assert cluster.poll(status="STOPPED") == AttemptState("ended", None)
    assert cluster.poll(404) == GONE
    assert cluster.poll(status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT") == RETURNED
    assert str(cluster.asked[-1].url) == "http://head:8265/api/jobs/llmprune-0123456789ab-2"
    assert cluster.poll(status="FAILED", message="Traceback\nThe node is gone") == AttemptState("ended", 1)
    assert cluster.launch.log.read_text() == "llmprune: Ray: The node is gone\n"


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_state_that_is_unknown(cluster: FakeCluster, status: int) -> None:
    """While a cluster does not answer or refuses the token, the state of its jobs is unknown."""
    assert cluster.poll(status) == UNKNOWN
    cluster.answer = httpx.ConnectError("refused")
    assert cluster.ray.poll(cluster.launch) == UNKNOWN
    assert cluster.ray.capacity() == 0
    cluster.ray.stop(cluster.launch, force=True)


def test_a_running_job_is_polled_every_few_seconds(tmp_path: Path) -> None:
    """Between two requests the launcher returns the last state."""
    cluster = FakeCluster(tmp_path, RayTiming(poll_every=60.0))
    assert [cluster.poll(status="RUNNING") for _ in range(3)] == [RUNNING] * 3
    assert len(cluster.asked) == 1


def test_a_silent_cluster_does_not_block_the_supervisor(tmp_path: Path) -> None:
    """After a request without an answer the cluster is not asked for a while, however many jobs it has."""
    cluster = FakeCluster(tmp_path, RayTiming(poll_every=0.0, pause=60.0))
    cluster.answer = httpx.ConnectTimeout("nobody")
    assert [cluster.ray.poll(cluster.launch) for _ in range(3)] == [UNKNOWN] * 3
    assert cluster.ray.capacity() == 0
    assert len(cluster.asked) == 1


def test_one_waits_at_a_time(cluster: FakeCluster) -> None:
    """The capacity is 1 while no job waits in Ray's queue, and after a lost answer only once its state is known."""
    assert cluster.ray.capacity() == 1
    cluster.answer = httpx.ReadTimeout("slow")
    cluster.ray.start(cluster.launch)
    cluster.answer = httpx.Response(200, json={})
    assert cluster.ray.capacity() == 0
    assert cluster.poll(404) == GONE
    assert cluster.ray.capacity() == 1


def test_a_refused_job_says_why(cluster: FakeCluster) -> None:
    """A job that the cluster refuses fails at once, with the last line of the answer."""
    cluster.answer = httpx.Response(400, text="Traceback (most recent call last):\nValueError: no such option")
    with pytest.raises(LLMPruneError, match=r"http://head:8265 refused the job: ValueError: no such option"):
        cluster.ray.start(cluster.launch)


def test_a_cluster_whose_nodes_start_is_asked_later(tmp_path: Path) -> None:
    """A job that no node's agent can take yet is not failed, and the cluster is not asked for a while."""
    cluster = FakeCluster(tmp_path, RayTiming(poll_every=0.0, pause=60.0))
    cluster.answer = httpx.Response(500, text="Exception: No available agent to submit job, please try again later.")
    with pytest.raises(NotNow, match="waits for the cluster"):
        cluster.ray.start(cluster.launch)
    assert (cluster.ray.capacity(), len(cluster.asked)) == (0, 1)


def test_a_lost_node_is_told_from_an_actor_that_died(cluster: FakeCluster) -> None:
    """A job is lost with its node, and not if Ray ended it on a node that lives; while nobody knows, it is unknown."""
    died = {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "out of memory"}

    def poll(nodes: Any) -> AttemptState:
        cluster.answers = {"/api/v0/nodes": httpx.Response(200, json=nodes)}
        return cluster.poll(**died, driver_node_id="one")

    def listed(state: str) -> Any:
        return {"data": {"result": {"result": [{"node_id": "one", "node_ip": "10.0.0.1", "state": state}]}}}

    assert poll(listed("DEAD")) == AttemptState("lost", machine="10.0.0.1")
    assert poll({"data": {"result": {"result": []}}}) == AttemptState("lost", machine="one")
    assert poll(listed("ALIVE")) == AttemptState("ended", 1)
    assert poll({"data": None}) == UNKNOWN
    assert cluster.launch.log.read_text() == "llmprune: Ray: out of memory\n"


def test_jobs_of_a_cluster_that_is_away_wait(tmp_path: Path) -> None:
    """Jobs for a cluster that does not answer stay queued, and others run; without --ray there is no launcher."""
    harness = ServiceHarness(tmp_path, ray=f"http://127.0.0.1:{free_port()}")
    away, here = harness.submit(launcher="ray")["id"], harness.submit(recipe(n=1))["id"]
    assert harness.until_ended(here)["state"] == "succeeded"
    assert (harness.job(away)["state"], harness.job(away)["attempts"]) == ("queued", 0)
    plain = ServiceHarness(tmp_path / "plain")
    refused = plain.http.post("/v1/jobs", content=RECIPE, params={"launcher": "ray"}, headers=YAML)
    assert (refused.status_code, "choose local, torchrun" in refused.text) == (422, True)


def test_a_token_for_the_cluster(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to the cluster have the token in RAY_AUTH_TOKEN."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={})

    Ray("http://head:8265/", FAKE, grace=1.0, transport=httpx.MockTransport(handle)).capacity()
    assert asked[0].headers["Authorization"] == "Bearer abc"
