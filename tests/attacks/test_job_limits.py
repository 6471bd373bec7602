"""Limits of a job without any option: time, memory and log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.commands import command
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.common import machine_memory as machine
from llmprune.common.machine_memory import machine_memory
from llmprune.service import server
from llmprune.service.memory import memory_of, memory_per_job
from llmprune.service.settings import Settings
from llmprune.service.supervisor import devices, overuse, supervisor
from llmprune.service.supervisor.processes import processes_of_job

MB = 10**6


def running(job: dict[str, Any]) -> bool:
    """Check whether a job's process has reported progress."""
    return job["state"] == "running" and job["total"] is not None


@pytest.fixture
def served_with(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which ``llmprune serve`` would serve."""
    found: list[Settings] = []
    monkeypatch.setattr(server, "serve", found.append)
    monkeypatch.setattr(devices, "_driver_names", lambda: ["0"])
    monkeypatch.setattr(devices, "find_gpus", tuple)
    return found


@pytest.fixture
def weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that looks at memory and logs in every round."""
    monkeypatch.setattr(supervisor, "MEASURE_EVERY", 0.0)


def test_a_job_may_run_for_a_day_and_longer_only_by_choice(tmp_path: Path, served_with: list[Settings]) -> None:
    """Without a limit of its own a job has the service's, which is a day; ``--time-limit 0`` is no limit."""
    harness = ServiceHarness(tmp_path)
    assert harness.submit()["time_limit"] == 86_400
    answer = harness.http.post("/v1/jobs", params={"time_limit": 86_401}, content=RECIPE, headers=YAML)
    said = "time_limit: 86,401 s asked and the limit is 86,400 s; ask for less"
    assert (answer.status_code, answer.json()["problems"]) == (422, [said])
    for options in ((), ("--time-limit", "60"), ("--time-limit", "0")):
        assert command("serve", "--data-dir", tmp_path / "data", *options).code == 0
    assert [settings.time_limit for settings in served_with] == [86_400, 60, None]


def test_a_job_queued_without_a_limit_has_the_service_s(tmp_path: Path) -> None:
    """A table of an earlier version, or of a service without a limit, has jobs that would run on for ever."""
    unlimited = ServiceHarness(tmp_path, time_limit=None)
    job = unlimited.submit(recipe(pause=30))
    assert job["time_limit"] is None
    harness = ServiceHarness(tmp_path, time_limit=0.3)
    ended = harness.until_ended(job["id"])
    assert ended["state"] == "failed"
    assert "it ran longer than its limit of 0.3 s" in ended["error"]


def test_jobs_share_the_memory_of_the_machine(tmp_path: Path, served_with: list[Settings]) -> None:
    """Slots and GPUs have equal shares by default; ``--memory-limit`` says otherwise, 0 is no limit."""
    for options in ((), ("--slots", "3", "--gpus", "0"), ("--memory-limit", "20GB"), ("--memory-limit", "0")):
        assert command("serve", "--data-dir", tmp_path / "data", *options).code == 0
    whole = 0.8 * machine_memory()
    assert [settings.memory_limit for settings in served_with] == [int(whole), int(whole / 4), 20 * 10**9, None]
    wrong = command("serve", "--memory-limit", "much")
    assert (wrong.code, "a size is a number with a unit" in wrong.err) == (2, True)


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of RAM and of the limits of the control groups around this process."""
    limits = [tmp_path / name for name in ("max", "small", "missing")]
    limits[0].write_text("max\n")
    limits[1].write_text("3000000\n")
    monkeypatch.setattr(machine, "_limit_files", lambda: limits)
    assert (machine_memory(), memory_per_job(3)) == (3 * MB, 800_000)


@pytest.mark.usefixtures("weighed")
def test_a_job_that_uses_too_much_memory_is_ended_and_others_run_on(tmp_path: Path) -> None:
    """With all its processes, at once, and with a sentence that names the figure, the limit and what to do."""
    harness = ServiceHarness(tmp_path, slots=2, memory_limit=90 * MB)
    greedy = harness.submit(recipe(hoard=150, pause=30, deaf=1, leave=1))["id"]
    modest = harness.submit(recipe(hoard=20, pause=0.2))["id"]
    ended = harness.until_ended(greedy)
    assert ended["state"] == "failed"
    assert ended["error"].startswith("it used ")
    assert "a job may use 90 MB" in ended["error"]
    assert "--memory-limit" in ended["error"]
    assert processes_of_job(greedy) == []
    assert harness.until_ended(modest)["state"] == "succeeded"
    assert harness.http.post(f"/v1/jobs/{greedy}/retry").status_code == 200
    assert "a job may use" in harness.until_ended(greedy)["error"]


@pytest.mark.usefixtures("weighed")
def test_a_job_has_the_memory_of_each_of_its_gpus(tmp_path: Path) -> None:
    """The limit is one job's, or that of each GPU that it holds."""
    harness = ServiceHarness(tmp_path, gpus=("0", "1"), memory_limit=90 * MB)
    assert harness.until_ended(harness.submit(recipe(hoard=110, pause=0.3), gpus=2)["id"])["state"] == "succeeded"
    assert harness.until_ended(harness.submit(recipe(hoard=110, pause=30), gpus=1)["id"])["state"] == "failed"


@pytest.mark.usefixtures("weighed")
def test_the_processes_are_scanned_once_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs run; without a limit not at all."""
    scans: list[None] = []
    monkeypatch.setattr(overuse, "processes_by_job", lambda: scans.append(None) or {})  # type: ignore[func-returns-value]
    harness = ServiceHarness(tmp_path, slots=3)
    jobs = [harness.submit(recipe(pause=30, n=n))["id"] for n in range(3)]
    harness.supervisor.round()
    scans.clear()
    harness.supervisor.round()
    assert len(scans) == 1
    harness.supervisor.settings = harness.settings.model_copy(update={"memory_limit": None})
    harness.supervisor.round()
    assert len(scans) == 1
    for job in jobs:
        harness.http.post(f"/v1/jobs/{job}/cancel")
    for job in jobs:
        harness.until_ended(job)


def test_mapped_weights_do_not_count(tmp_path: Path) -> None:
    """Pages of a file can be dropped at any time; memory that a process wrote cannot."""
    (tmp_path / "weights").write_bytes(bytes(60 * MB))
    steps = (
        "import mmap, sys; print(flush=True); input();"
        "file = open(sys.argv[1], 'rb'); mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ);"
        "print(mapped.find(b'x'), flush=True); input();"  # every page is read
        f"kept = bytearray(b'x') * {60 * MB}; print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", steps, str(tmp_path / "weights")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        measured = []
        for _ in range(3):
            process.stdout.readline()
            measured.append(memory_of([psutil.Process(process.pid)]))
            process.stdin.write("\n")
    start, mapped, kept = measured
    assert mapped - start < 20 * MB
    assert kept - mapped > 50 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
def test_the_kernel_ends_a_job_rather_than_the_service(tmp_path: Path) -> None:
    """Every process of a job offers itself; the service does not."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit(recipe(pause=30, leave=1))["id"]
    harness.until(job, running)
    scores = [int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in processes_of_job(job)]
    assert scores == [500, 500, 500]
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 500
    harness.http.post(f"/v1/jobs/{job}/cancel")
    harness.until_ended(job)


@pytest.mark.usefixtures("weighed")
def test_a_job_that_prints_without_end_is_ended(tmp_path: Path) -> None:
    """Its log is cut to half of the limit, so that a retry can write one too."""
    harness = ServiceHarness(tmp_path, log_limit=MB)
    job = harness.submit(recipe(flood=2, pause=30))["id"]
    ended = harness.until_ended(job)
    assert ended["state"] == "failed"
    assert "it wrote a log of 2 MB and the limit is 1 MB" in ended["error"]
    assert (harness.settings.log(job).stat().st_size, processes_of_job(job)) == (MB // 2, [])


def test_an_owner_has_a_number_of_jobs(tmp_path: Path) -> None:
    """Jobs that are submitted and cancelled again do not fill the table; what to do is said."""
    harness = ServiceHarness(tmp_path, max_jobs=3)
    for _ in range(3):
        harness.http.post(f"/v1/jobs/{harness.submit()['id']}/cancel")
    answer = harness.http.post("/v1/jobs", content=RECIPE, headers=YAML)
    assert (answer.status_code, "has 3 of 3; delete some" in answer.text) == (429, True)
