"""Jobs from submission to end, through kills, cancellations, retries and restarts of the service."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.service import FAKE, ServiceHarness, recipe

from llmprune.service.database.database import Database
from llmprune.service.jobs.job import Job
from llmprune.service.jobs.store import JobStore
from llmprune.service.supervisor.launchers.base import Launch
from llmprune.service.supervisor.launchers.local import Local
from llmprune.service.supervisor.processes import MARK, processes_of_job
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path)


def running(job: dict[str, object]) -> bool:
    """Return whether a job's process has written its progress."""
    return job["state"] == "running" and job["total"] is not None


def test_a_job_runs_and_its_outputs_can_be_had(harness: ServiceHarness) -> None:
    """A job's figures, log and files can be fetched, and its recipe is stored byte for byte."""
    text = recipe(say="hello") + "# ends with CR LF\r\n"
    job = harness.submit(text)["id"]
    ended = harness.until_ended(job)
    assert (ended["state"], ended["exit_code"], ended["fraction"], ended["attempts"]) == ("succeeded", 0, 1.0, 1)
    assert ended["figures"]["bytes"] == [400, 240]
    assert harness.http.get(f"/v1/jobs/{job}/log").text == "hello\n"
    assert (harness.settings.folder(job) / "recipe.yaml").read_bytes() == text.encode()
    names = [file["name"] for file in harness.http.get(f"/v1/jobs/{job}/artifacts").json()]
    assert names == ["arguments.json", "report.html", "report.json", "model/model.safetensors"]
    model = harness.http.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors")
    assert model.content == (harness.run_folder(job) / "model" / "model.safetensors").read_bytes()
    assert harness.http.get(f"/v1/jobs/{job}/report").json()["mean_retention"] == 0.9


def test_jobs_run_in_an_empty_folder_in_their_own_group(harness: ServiceHarness) -> None:
    """A job's working directory is empty, so that no hub id names a folder in it; it has its own process group."""
    job = harness.submit(recipe(pause=5))["id"]
    harness.until(job, running)
    started = json.loads((harness.run_folder(job) / "arguments.json").read_text())
    assert list(Path(started["cwd"]).iterdir()) == []
    assert {os.getpgid(process.pid) for process in processes_of_job(job)} != {os.getpgid(0)}
    harness.http.post(f"/v1/jobs/{job}/cancel")
    harness.until_ended(job)


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_run_says_why(harness: ServiceHarness, code: int) -> None:
    """The job has the exit code and the last message of llmprune."""
    ended = harness.until_ended(harness.submit(recipe(exit=code))["id"])
    assert (ended["state"], ended["exit_code"], ended["figures"]) == ("failed", code, None)
    assert "went wrong as asked" in ended["error"]


@pytest.mark.parametrize("wish", [{}, {"deaf": 1}, {"leave": 1}])
def test_cancelling_leaves_no_process(harness: ServiceHarness, wish: dict[str, object]) -> None:
    """Cancellation ends every process, also of a run that ignores SIGTERM, and children in other sessions."""
    job = harness.submit(recipe(pause=30, **wish))["id"]
    harness.until(job, running)
    assert harness.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelling"
    assert harness.until_ended(job)["state"] == "cancelled"
    assert processes_of_job(job) == []


def test_a_finished_run_leaves_no_process_either(harness: ServiceHarness) -> None:
    """Processes that a run leaves in another session are ended with it."""
    job = harness.submit(recipe(leave=1))["id"]
    assert harness.until_ended(job)["state"] == "succeeded"
    assert processes_of_job(job) == []


def test_a_queued_job_is_cancelled_at_once_and_an_ended_one_not(harness: ServiceHarness) -> None:
    """Cancelling needs no supervisor while a job waits, and is a conflict once it has ended."""
    job = harness.submit()["id"]
    assert harness.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert harness.http.post(f"/v1/jobs/{job}/cancel").status_code == 409
    harness.supervisor.round()
    assert harness.job(job)["attempts"] == 0


@pytest.mark.parametrize("victim", ["run", "keeper", "all"])
def test_a_killed_process_ends_the_job_and_a_retry_continues(harness: ServiceHarness, victim: str) -> None:
    """A killed job fails with the reason and leaves no process; a retry continues after the finished layers."""
    job = harness.submit(recipe(pause=0.3, layers=4))["id"]
    harness.until(job, lambda found: running(found) and (found["done"] or 0) >= 1)
    keepers = [
        process for process in processes_of_job(job) if "llmprune.service.supervisor.job_runner" in process.cmdline()
    ]
    runs = [process for process in processes_of_job(job) if process not in keepers]
    for process in {"run": runs, "keeper": keepers, "all": keepers + runs}[victim]:
        process.kill()
    ended = harness.until_ended(job)
    assert ended["state"] == "failed"
    assert "was killed" in ended["error"]
    assert processes_of_job(job) == []
    first = (harness.run_folder(job) / "model.partial" / "layer-0").stat().st_mtime_ns
    assert harness.http.post(f"/v1/jobs/{job}/retry").json()["state"] == "queued"
    again = harness.until_ended(job)
    assert (again["state"], again["attempts"], again["error"]) == ("succeeded", 2, None)
    assert (harness.run_folder(job) / "model.partial" / "layer-0").stat().st_mtime_ns == first
    assert not (harness.run_folder(job) / "TWICE").exists()


def test_a_new_supervisor_finds_running_jobs(harness: ServiceHarness) -> None:
    """A job survives its supervisor; the next one follows it and does not start it again."""
    job = harness.submit(recipe(pause=0.2, layers=4))["id"]
    harness.until(job, running)
    harness.supervisor = Supervisor(harness.settings)
    ended = harness.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1)
    assert not (harness.run_folder(job) / "TWICE").exists()


def test_a_job_that_ended_with_the_service_continues(harness: ServiceHarness) -> None:
    """After a crash of the whole machine the job is queued again and succeeds."""
    job = harness.submit(recipe(pause=0.2, layers=4))["id"]
    harness.until(job, running)
    for process in processes_of_job(job):
        process.kill()
    psutil.wait_procs(processes_of_job(job), timeout=5)
    harness.supervisor = Supervisor(harness.settings)
    ended = harness.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 2)


class Dying(Local):
    """A launcher whose supervisor dies before the process starts."""

    def start(self, launch: Launch) -> None:
        """End the supervisor."""
        raise KeyboardInterrupt


def test_a_supervisor_that_dies_while_starting_a_job_loses_nothing(harness: ServiceHarness) -> None:
    """A job that is marked as running and has no process yet is queued again by the next supervisor."""
    job = harness.submit()["id"]
    harness.supervisor.launchers["local"] = Dying(FAKE)
    with pytest.raises(KeyboardInterrupt):
        harness.supervisor.round()
    assert harness.job(job)["state"] == "running"
    harness.supervisor = Supervisor(harness.settings)
    assert harness.until_ended(job)["state"] == "succeeded"


def test_stopping_in_order_puts_jobs_back(harness: ServiceHarness) -> None:
    """A stopped service ends its jobs and queues them again, and the next service continues them."""
    job = harness.submit(recipe(pause=0.2, layers=4))["id"]
    harness.until(job, running)
    harness.supervisor.stop()
    assert harness.job(job)["state"] == "queued"
    assert processes_of_job(job) == []
    harness.supervisor = Supervisor(harness.settings)
    assert harness.until_ended(job)["state"] == "succeeded"


class FullDisk(Local):
    """A launcher that finds the disk full."""

    def start(self, launch: Launch) -> None:
        """Fail as a write to a full disk does."""
        raise OSError(28, "No space left on device")


def test_a_full_disk_ends_one_job_and_not_the_service(harness: ServiceHarness) -> None:
    """A job whose folder cannot be written fails with the remedy, and runs once there is space."""
    job = harness.submit()["id"]

    local = harness.supervisor.launchers["local"]
    harness.supervisor.launchers["local"] = FullDisk(FAKE)
    harness.supervisor.round()
    harness.supervisor.launchers["local"] = local
    ended = harness.job(job)
    assert (ended["state"], "No space left" in ended["error"]) == ("failed", True)
    harness.http.post(f"/v1/jobs/{job}/retry")
    assert harness.until_ended(job)["state"] == "succeeded"


def test_the_mark_is_in_every_process(harness: ServiceHarness) -> None:
    """Every process of a job has the job's id in its environment, by which it is found after a crash."""
    job = harness.submit(recipe(pause=30))["id"]
    harness.until(job, running)
    found = processes_of_job(job)
    assert len(found) == 2
    assert all(process.environ()[MARK] == job for process in found)
    for process in found:
        process.send_signal(signal.SIGKILL)
    harness.until_ended(job)


class StaleJobs(JobStore):
    """A job table whose reads a test sets."""

    def __init__(self, database: Database, read: Callable[[str], Job | None]) -> None:
        super().__init__(database)
        self.read = read

    def get(self, job: str) -> Job | None:
        """Return what the test says."""
        return self.read(job)


def test_a_job_deleted_between_two_reads_is_not_found(harness: ServiceHarness) -> None:
    """A job that another request deleted meanwhile gives 404; a KeyError, an error of the service, gives 500."""
    job = harness.submit()["id"]
    harness.http.post(f"/v1/jobs/{job}/cancel")
    found = harness.service.jobs.get(job)
    harness.service.jobs.delete(job)
    jobs = StaleJobs(harness.service.database, lambda _: found)
    harness.app.state.service = replace(harness.service, jobs=jobs)
    for change in ("cancel", "retry"):
        answer = harness.http.post(f"/v1/jobs/{job}/{change}")
        assert (answer.status_code, answer.json()["detail"]) == (404, f"there is no job '{job}'")
    assert harness.http.delete(f"/v1/jobs/{job}").status_code == 404
    jobs.read = lambda name: {}[name]
    assert harness.http.get(f"/v1/jobs/{job}").status_code == 500


@pytest.mark.parametrize(("place", "kind"), [("jobs/d15748b2b40", "job"), ("sweeps/mine", "sweep")])
def test_what_is_no_id_is_not_found(harness: ServiceHarness, place: str, kind: str) -> None:
    """An id that is cut short or mistyped is answered as one that does not exist, with the form of an id."""
    answer = harness.http.get(f"/v1/{place}")
    told = f"there is no {kind} {place.partition('/')[2]!r}: an id is 12 of the digits 0-9 and letters a-f"
    assert (answer.status_code, answer.json()["detail"]) == (404, told)
    page = harness.http.get(f"/{place}", headers={"Accept": "text/html"})
    assert page.status_code == 404
    assert "Wrong recipe" not in page.text
