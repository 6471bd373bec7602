"""Jobs on a real Ray cluster of two nodes, which share the data folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from helpers.ray_nodes import Cluster
from helpers.service import FAKE, YAML, ServiceHarness, recipe

from llmprune.service.jobs.job import ENDED
from llmprune.service.supervisor.processes import processes_of_job
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster: a head without GPUs, and a node with two pretended GPUs."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed: uv pip install 'llmprune[ray]'")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets lie there: a short path
        found = Cluster(Path(folder))
        try:
            if not found.start(gpus=2):
                pytest.skip(f"ray start does not come up on this machine: {found.said()}")
            yield found
        finally:
            found.stop()


@pytest.fixture
def harness(cluster: Cluster, tmp_path: Path) -> ServiceHarness:
    """A service that uses the cluster, with fake runs."""
    return ServiceHarness(tmp_path, ray=cluster.address, grace=2.0)


def submit(harness: ServiceHarness, gpus: int = 0, **behaviour: object) -> str:
    """Submit a job for the cluster and return its id."""
    return str(harness.submit(recipe(**behaviour), launcher="ray", gpus=gpus)["id"])


def until(harness: ServiceHarness, job: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Run rounds until a condition holds, with the time that a cluster needs."""
    return harness.until(job, reached, 180, pause=0.3)


def until_ended(harness: ServiceHarness, job: str) -> dict[str, Any]:
    """Run rounds until the job has ended, and return it."""
    return until(harness, job, lambda found: found["state"] in ENDED)


def at_ray(harness: ServiceHarness, job: str) -> dict[str, Any]:
    """Return what Ray knows of a job's newest attempt."""
    name = f"llmprune-{job}-{harness.job(job)['attempts']}"
    found: dict[str, Any] = httpx.get(f"{harness.settings.ray}/api/jobs/{name}", timeout=30).json()
    return found


def runs(job: str) -> list[psutil.Process]:
    """Return the processes of a job's run, without those of Ray, which carry the job's mark too."""
    return [process for process in processes_of_job(job) if FAKE[1] in process.cmdline()]


def has_progress(job: dict[str, Any]) -> bool:
    """Return whether the run itself has written its progress."""
    return job["state"] == "running" and job["total"] is not None


def test_jobs_get_their_gpus_and_their_results_come_back(harness: ServiceHarness, cluster: Cluster) -> None:
    """State, exit code, log, figures and files are as on this machine; another job fails with its own message."""
    job = harness.submit(recipe(say="hello"), {"X-Hub-Token": "hf_of_this_job"}, launcher="ray", gpus=2)["id"]
    other = submit(harness, exit=3)
    ended = until_ended(harness, job)
    assert (ended["state"], ended["exit_code"]) == ("succeeded", 0), ended["error"]
    assert (ended["figures"]["bytes"], ended["devices"]) == ([400, 240], [])
    assert harness.http.get(f"/v1/jobs/{job}/log").text == "hello\n"
    assert harness.http.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors").status_code == 200
    seen = json.loads((harness.run_folder(job) / "arguments.json").read_text())
    assert sorted(seen["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
    assert list(Path(seen["cwd"]).iterdir()) == []
    assert seen["environment"]["HF_TOKEN_PATH"] == str(harness.settings.folder(job).absolute() / "hub-token")
    assert "hf_of_this_job" not in json.dumps(at_ray(harness, job))
    assert at_ray(harness, job)["driver_node_id"] in cluster.workers
    failed = until_ended(harness, other)
    assert (failed["state"], failed["exit_code"]) == ("gate_not_met", 3)
    assert "went wrong as asked" in failed["error"]
    seen = json.loads((harness.run_folder(other) / "arguments.json").read_text())
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    more = harness.http.post("/v1/jobs", content=recipe(), params={"launcher": "ray", "gpus": 3}, headers=YAML)
    assert more.status_code == 422
    assert "gpus: 3 asked and the largest node of the cluster has 2; ask for fewer" in more.text


@pytest.mark.slow
def test_the_cluster_is_full(harness: ServiceHarness) -> None:
    """One job waits in Ray's queue without run time, the next ones in the service's; all can be cancelled."""
    big, waits, later = submit(harness, 2, pause=60), submit(harness, 2, n=1), submit(harness, 2, n=2)
    until(harness, big, has_progress)
    found = until(harness, waits, lambda job: job["step"] == "waiting for the cluster")
    for _ in range(5):
        harness.supervisor.round()
    assert (harness.job(later)["state"], harness.job(waits)["ran_seconds"]) == ("queued", found["ran_seconds"])
    assert harness.http.get("/v1/queue").json()["slots_used"] == 0
    for job in (later, waits, big):
        harness.http.post(f"/v1/jobs/{job}/cancel")
        assert until_ended(harness, job)["state"] == "cancelled"
    # it started as soon as it could, and ended at once
    until(harness, big, lambda _: at_ray(harness, waits)["status"] in ("FAILED", "STOPPED"))
    assert not harness.run_folder(waits).exists()
    assert runs(big) == runs(waits) == []


def test_a_restarted_service_and_a_lost_node(harness: ServiceHarness, cluster: Cluster) -> None:
    """Jobs on the cluster survive a stop of the service; one whose node is killed continues on another node."""
    job = submit(harness, 1, pause=1.5, layers=8)
    until(harness, job, has_progress)
    harness.supervisor.stop()
    harness.supervisor = Supervisor(harness.settings)
    until(harness, job, lambda found: (found["done"] or 0) >= 2)
    cluster.kill(at_ray(harness, job)["driver_node_id"])
    before = harness.job(job)["attempts"]
    until(harness, job, lambda found: found["state"] == "queued" or found["attempts"] > before)
    assert cluster.add_node(gpus=2)
    ended = until_ended(harness, job)
    assert (ended["state"], ended["attempts"] > before) == ("succeeded", True), ended["error"]
    assert not (harness.run_folder(job) / "TWICE").exists()
    makers = [path.read_text().split()[-1] for path in (harness.run_folder(job) / "model.partial").glob("layer-*")]
    assert len(makers) == 8
    assert len(set(makers)) == 2
