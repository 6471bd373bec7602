"""Jobs on a Ray cluster: a real one of one node, and one that misbehaves as real ones do."""

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
from helpers.service import FAKE, RECIPE, YAML, Bench, free_port, recipe

from llmprune.common.errors import LLMPruneError
from llmprune.service.cli.client import ENDED
from llmprune.service.supervisor.launchers import ray
from llmprune.service.supervisor.launchers.base import GONE, RETURNED, RUNNING, UNKNOWN, WAITING, Launch, Look
from llmprune.service.supervisor.launchers.ray import Ray
from llmprune.service.supervisor.processes import marked
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray head with two CPUs and, as far as it knows, two GPUs."""
    if find_spec("ray") is None:
        pytest.skip("ray is not installed: uv pip install 'llmprune[ray]'")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets lie there: a short path
        head = _Head(Path(folder))
        head.start()
        yield head.address
        head.stop()


class _Head:
    """``ray start --head`` in a session of its own, so that its processes are known."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """A busy machine may need a second try: Ray's node gives up when its agent takes 15 seconds."""
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
        """Whether the cluster takes jobs: its head answers, and so does the agent of its node."""
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
        """End it, and every process that it left."""
        parts = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        for part in psutil.wait_procs(parts, timeout=10)[1]:
            part.kill()


@pytest.fixture
def bench(cluster: str, tmp_path: Path) -> Bench:
    """A service that knows the cluster; its jobs are fakes."""
    return Bench(tmp_path, ray=cluster, grace=2.0)


def submit(bench: Bench, gpus: int = 0, **wishes: object) -> str:
    """A job for the cluster."""
    return str(bench.submit(recipe(**wishes), launcher="ray", gpus=gpus)["id"])


def until(bench: Bench, job: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """As ``Bench.until``, with the patience that a cluster needs."""
    return bench.until(job, reached, 180)


def until_ended(bench: Bench, job: str) -> dict[str, Any]:
    """The job as it ended."""
    return until(bench, job, lambda found: found["state"] in ENDED)


def status(bench: Bench, job: str) -> str:
    """What Ray says of a job."""
    return str(httpx.get(f"{bench.settings.ray}/api/jobs/llmprune-{job}-1", timeout=30).json()["status"])


def runs(job: str) -> list[psutil.Process]:
    """The processes of a job's run; Ray's own for the job carry its mark too."""
    return [process for process in marked(job) if FAKE[1] in process.cmdline()]


def works(job: dict[str, Any]) -> bool:
    """Whether the run itself has said how far it is."""
    return job["state"] == "running" and job["total"] is not None


def test_jobs_get_their_gpus_and_their_results_come_back(bench: Bench) -> None:
    """State, exit code, log, figures and files are there as from this machine; another job fails with its own words."""
    job = bench.submit(recipe(say="hello"), {"X-Hub-Token": "hf_of_this_job"}, launcher="ray", gpus=2)["id"]
    other = submit(bench, exit=3)
    ended = until_ended(bench, job)
    assert (ended["state"], ended["exit_code"], ended["attempts"]) == ("succeeded", 0, 1), ended["error"]
    assert (ended["figures"]["bytes"], ended["devices"]) == ([400, 240], [])
    assert bench.http.get(f"/v1/jobs/{job}/log").text == "hello\n"
    assert bench.http.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors").status_code == 200
    seen = json.loads((bench.run_folder(job) / "arguments.json").read_text())
    assert sorted(seen["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
    assert list(Path(seen["cwd"]).iterdir()) == []
    assert seen["environment"]["HF_TOKEN_PATH"] == str(bench.settings.folder(job).absolute() / "hub-token")
    assert "hf_of_this_job" not in httpx.get(f"{bench.settings.ray}/api/jobs/llmprune-{job}-1").text
    failed = until_ended(bench, other)
    assert (failed["state"], failed["exit_code"]) == ("gate_not_met", 3)
    assert "went wrong as asked" in failed["error"]
    seen = json.loads((bench.run_folder(other) / "arguments.json").read_text())
    assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == ""


def test_the_cluster_is_full(bench: Bench) -> None:
    """One job waits there and its time does not run; the next stay in the service's queue; both can be cancelled."""
    big, waits, later = submit(bench, 2, pause=60), submit(bench, 2, n=1), submit(bench, 2, n=2)
    until(bench, big, works)
    found = until(bench, waits, lambda job: job["step"] == "waiting for the cluster")
    for _ in range(5):
        bench.supervisor.round()
    assert (bench.job(later)["state"], bench.job(waits)["ran_seconds"]) == ("queued", found["ran_seconds"])
    assert bench.http.get("/v1/queue").json()["slots_used"] == 0
    for job in (later, waits, big):
        bench.http.post(f"/v1/jobs/{job}/cancel")
        assert until_ended(bench, job)["state"] == "cancelled"
    until(bench, big, lambda _: status(bench, waits) == "FAILED")  # started as soon as it could be, and ended at once
    assert not bench.run_folder(waits).exists()
    assert runs(big) == runs(waits) == []


def test_a_restarted_service_finds_its_jobs_and_a_retry_continues(bench: Bench) -> None:
    """Stopping the service leaves the cluster's jobs alone; one that is killed there fails, and can be tried again."""
    job = submit(bench, pause=1.5, layers=8)
    until(bench, job, works)
    bench.supervisor.stop()
    bench.supervisor = Supervisor(bench.settings)
    until(bench, job, lambda found: (found["done"] or 0) >= 2)
    for process in runs(job):
        process.kill()
    ended = until_ended(bench, job)
    assert (ended["state"], ended["attempts"], "ended from outside" in ended["error"]) == ("failed", 1, True)
    assert bench.http.post(f"/v1/jobs/{job}/retry").status_code == 200
    again = until_ended(bench, job)
    assert (again["state"], again["attempts"]) == ("succeeded", 2)
    assert not (bench.run_folder(job) / "TWICE").exists()


class Odd:
    """A cluster that answers as it is told to."""

    def __init__(self, folder: Path) -> None:
        self.answer: httpx.Response | Exception = httpx.Response(200, json={})
        self.asked: list[httpx.Request] = []
        self.ray = Ray("http://head:8265", FAKE, grace=1.0, transport=httpx.MockTransport(self._handle))
        self.launch = Launch("0123456789ab", 2, folder, ("run",), 1, (), {})

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def look(self, code: int = 200, /, **details: Any) -> Look:
        """What the launcher makes of an answer."""
        self.answer = httpx.Response(code, json=details)
        return self.ray.look(self.launch)


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Odd:
    """A cluster to be told, which is asked whenever there is a question."""
    monkeypatch.setattr(ray, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(ray, "_SILENCE", 0.0)
    return Odd(tmp_path)


def test_what_a_cluster_says_of_a_job(odd: Odd) -> None:
    """Each status is one of the launcher's; a job that Ray gave up waiting for is to be queued again."""
    assert odd.look(status="PENDING") == WAITING
    odd.ray.stop(odd.launch, force=False)
    assert odd.look(status="PENDING") == Look("ended", None)  # Ray itself stops it only once it runs
    assert odd.look(status="RUNNING") == RUNNING
    assert odd.look(status="SUCCEEDED", driver_exit_code=0) == Look("ended", 0)
    assert odd.look(status="FAILED", driver_exit_code=3) == Look("ended", 3)
    assert odd.look(status="STOPPED") == Look("ended", None)
    assert odd.look(404) == GONE
    assert odd.look(status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_START_TIMEOUT") == RETURNED
    assert str(odd.asked[-1].url) == "http://head:8265/api/jobs/llmprune-0123456789ab-2"
    assert odd.look(status="FAILED", message="Traceback\nThe node is gone") == Look("ended", 1)
    assert odd.launch.log.read_text() == "llmprune: Ray: The node is gone\n"


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_where_nobody_knows(odd: Odd, status: int) -> None:
    """A cluster that is away or wants another token says nothing of its jobs: they neither ended nor are they gone."""
    assert odd.look(status) == UNKNOWN
    odd.answer = httpx.ConnectError("refused")
    assert odd.ray.look(odd.launch) == UNKNOWN
    assert odd.ray.room() == 0
    odd.ray.stop(odd.launch, force=True)


def test_a_silent_cluster_does_not_hold_up_the_supervisor(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, then left alone for a while, however many jobs it has; one that answers, every two seconds."""
    monkeypatch.setattr(ray, "_LOOK_EVERY", 60.0)
    assert [odd.look(status="RUNNING") for _ in range(3)] == [RUNNING] * 3
    assert len(odd.asked) == 1
    monkeypatch.setattr(ray, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(ray, "_SILENCE", 60.0)
    odd.answer = httpx.ConnectTimeout("nobody")
    assert [odd.ray.look(odd.launch) for _ in range(3)] == [UNKNOWN] * 3
    assert odd.ray.room() == 0
    assert len(odd.asked) == 2


def test_one_waits_at_a_time(odd: Odd) -> None:
    """There is room when nothing of the service waits there, and after a lost answer only once it is known."""
    assert odd.ray.room() == 1
    odd.answer = httpx.ReadTimeout("slow")
    odd.ray.start(odd.launch)
    odd.answer = httpx.Response(200, json={})
    assert odd.ray.room() == 0
    assert odd.look(404) == GONE
    assert odd.ray.room() == 1


def test_a_refused_job_says_why(odd: Odd) -> None:
    """What the cluster will not take fails at once, with the last line of what it said."""
    odd.answer = httpx.Response(400, text="Traceback (most recent call last):\nValueError: no such option")
    with pytest.raises(LLMPruneError, match=r"http://head:8265 refused the job: ValueError: no such option"):
        odd.ray.start(odd.launch)


def test_jobs_of_a_cluster_that_is_away_wait(tmp_path: Path) -> None:
    """They stay queued, and those of this machine go on; without --ray the launcher is not offered."""
    bench = Bench(tmp_path, ray=f"http://127.0.0.1:{free_port()}")
    away, here = submit(bench), bench.submit(recipe(n=1))["id"]
    assert bench.until_ended(here)["state"] == "succeeded"
    assert (bench.job(away)["state"], bench.job(away)["attempts"]) == ("queued", 0)
    plain = Bench(tmp_path / "plain")
    refused = plain.http.post("/v1/jobs", content=RECIPE, params={"launcher": "ray"}, headers=YAML)
    assert (refused.status_code, "choose local, torchrun" in refused.text) == (422, True)


def test_a_token_for_the_cluster(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that asks for Ray's own token gets the one in RAY_AUTH_TOKEN."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={})

    Ray("http://head:8265/", FAKE, grace=1.0, transport=httpx.MockTransport(handle)).room()
    assert asked[0].headers["Authorization"] == "Bearer abc"
