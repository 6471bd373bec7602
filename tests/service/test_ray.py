"""Jobs on a real Ray cluster of one node."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from helpers.service import FAKE, ServiceHarness, free_port, recipe

from llmprune.service.jobs.job import ENDED
from llmprune.service.supervisor.processes import processes_of_job
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray head with two CPUs and two pretended GPUs."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed: uv pip install 'llmprune[ray]'")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets lie there: a short path
        head = _Head(Path(folder))
        head.start()
        yield head.address
        head.stop()


class _Head:
    """A process of ``ray start --head`` in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the head; tries twice, because Ray's node gives up when its agent takes 15 seconds."""
        said = ""
        for _ in range(2):
            command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
            command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", f"--temp-dir={self.folder}"]
            command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}"]
            command += ["--num-cpus=2", "--num-gpus=2", "--object-store-memory=80000000"]
            with (self.folder / "said").open("wb") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            if self._answers(90):
                return
            self.stop()
            said = (self.folder / "said").read_text()[-2000:]
        pytest.skip(f"ray start --head does not come up on this machine: {said}")

    def _answers(self, seconds: float) -> bool:
        """Return whether the cluster accepts jobs: its head answers, and so does the agent of its node."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.address}/api/jobs/", timeout=10).is_success and self._has_a_node():
                    return True
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        return False

    def _has_a_node(self) -> bool:
        found = httpx.get(f"{self.address}/nodes?view=summary", timeout=10).json()
        return any(node["raylet"].get("state") == "ALIVE" for node in found["data"]["summary"])

    def stop(self) -> None:
        """End the head and every process that it left."""
        parts = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        for part in psutil.wait_procs(parts, timeout=10)[1]:
            part.kill()


@pytest.fixture
def harness(cluster: str, tmp_path: Path) -> ServiceHarness:
    """A service that uses the cluster, with fake runs."""
    return ServiceHarness(tmp_path, ray=cluster, grace=2.0)


def submit(harness: ServiceHarness, gpus: int = 0, **behaviour: object) -> str:
    """Submit a job for the cluster and return its id."""
    return str(harness.submit(recipe(**behaviour), launcher="ray", gpus=gpus)["id"])


def until(harness: ServiceHarness, job: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Run rounds until a condition holds, with the time that a cluster needs."""
    return harness.until(job, reached, 180)


def until_ended(harness: ServiceHarness, job: str) -> dict[str, Any]:
    """Run rounds until the job has ended, and return it."""
    return until(harness, job, lambda found: found["state"] in ENDED)


def status(harness: ServiceHarness, job: str) -> str:
    """Return Ray's status of a job's first attempt."""
    return str(httpx.get(f"{harness.settings.ray}/api/jobs/llmprune-{job}-1", timeout=30).json()["status"])


def runs(job: str) -> list[psutil.Process]:
    """Return the processes of a job's run, without those of Ray, which carry the job's mark too."""
    return [process for process in processes_of_job(job) if FAKE[1] in process.cmdline()]


def has_progress(job: dict[str, Any]) -> bool:
    """Return whether the run itself has written its progress."""
    return job["state"] == "running" and job["total"] is not None


def test_jobs_get_their_gpus_and_their_results_come_back(harness: ServiceHarness) -> None:
    """State, exit code, log, figures and files are as on this machine; another job fails with its own message."""
    job = harness.submit(recipe(say="hello"), {"X-Hub-Token": "hf_of_this_job"}, launcher="ray", gpus=2)["id"]
    other = submit(harness, exit=3)
    ended = until_ended(harness, job)
    assert (ended["state"], ended["exit_code"], ended["attempts"]) == ("succeeded", 0, 1), ended["error"]
    assert (ended["figures"]["bytes"], ended["devices"]) == ([400, 240], [])
    assert harness.http.get(f"/v1/jobs/{job}/log").text == "hello\n"
    assert harness.http.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors").status_code == 200
    seen = json.loads((harness.run_folder(job) / "arguments.json").read_text())
    assert sorted(seen["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
    assert list(Path(seen["cwd"]).iterdir()) == []
    assert seen["environment"]["HF_TOKEN_PATH"] == str(harness.settings.folder(job).absolute() / "hub-token")
    assert "hf_of_this_job" not in httpx.get(f"{harness.settings.ray}/api/jobs/llmprune-{job}-1").text
    failed = until_ended(harness, other)
    assert (failed["state"], failed["exit_code"]) == ("gate_not_met", 3)
    assert "went wrong as asked" in failed["error"]
    seen = json.loads((harness.run_folder(other) / "arguments.json").read_text())
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == ""


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
    until(
        harness, big, lambda _: status(harness, waits) == "FAILED"
    )  # started as soon as it could be, and ended at once
    assert not harness.run_folder(waits).exists()
    assert runs(big) == runs(waits) == []


def test_a_restarted_service_finds_its_jobs_and_a_retry_continues(harness: ServiceHarness) -> None:
    """Jobs on the cluster survive a stop of the service; a killed one fails, and a retry continues it."""
    job = submit(harness, pause=1.5, layers=8)
    until(harness, job, has_progress)
    harness.supervisor.stop()
    harness.supervisor = Supervisor(harness.settings)
    until(harness, job, lambda found: (found["done"] or 0) >= 2)
    for process in runs(job):
        process.kill()
    ended = until_ended(harness, job)
    assert (ended["state"], ended["attempts"], "was killed" in ended["error"]) == ("failed", 1, True)
    assert harness.http.post(f"/v1/jobs/{job}/retry").status_code == 200
    again = until_ended(harness, job)
    assert (again["state"], again["attempts"]) == ("succeeded", 2)
    assert not (harness.run_folder(job) / "TWICE").exists()
