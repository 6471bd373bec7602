"""The life of a job: from submission to its end, through kills, cancels, limits and restarts."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.service import RECIPE, YAML, Bench, recipe

from llmprune.service.supervisor.processes import MARK, marked
from llmprune.service.supervisor.supervisor import Supervisor


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A service whose jobs are fakes."""
    return Bench(tmp_path)


def running(job: dict[str, object]) -> bool:
    """Whether a job's process has told how far it is."""
    return job["state"] == "running" and job["total"] is not None


def test_a_job_runs_and_its_outputs_can_be_had(bench: Bench) -> None:
    """A recipe becomes a run folder; its figures, log and files are there, the recipe byte for byte."""
    text = recipe(say="hello") + "# ends with CR LF\r\n"
    job = bench.submit(text)["id"]
    ended = bench.until_ended(job)
    assert (ended["state"], ended["exit_code"], ended["fraction"], ended["attempts"]) == ("succeeded", 0, 1.0, 1)
    assert ended["figures"]["bytes"] == [400, 240]
    assert bench.http.get(f"/v1/jobs/{job}/log").text == "hello\n"
    assert (bench.settings.folder(job) / "recipe.yaml").read_bytes() == text.encode()
    names = [file["name"] for file in bench.http.get(f"/v1/jobs/{job}/artifacts").json()]
    assert names == ["arguments.json", "report.html", "report.json", "model/model.safetensors"]
    model = bench.http.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors")
    assert model.content == (bench.run_folder(job) / "model" / "model.safetensors").read_bytes()
    assert bench.http.get(f"/v1/jobs/{job}/report").json()["mean_retention"] == 0.9


def test_jobs_run_in_an_empty_folder_in_their_own_group(bench: Bench) -> None:
    """A job's working folder is empty, so that a hub id is never a folder that lies there; its group is its own."""
    job = bench.submit(recipe(pause=5))["id"]
    bench.until(job, running)
    started = json.loads((bench.run_folder(job) / "arguments.json").read_text())
    assert list(Path(started["cwd"]).iterdir()) == []
    assert {os.getpgid(process.pid) for process in marked(job)} != {os.getpgid(0)}
    bench.http.post(f"/v1/jobs/{job}/cancel")
    bench.until_ended(job)


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_run_says_why(bench: Bench, code: int) -> None:
    """The exit code and llmprune's last sentence are the job's."""
    ended = bench.until_ended(bench.submit(recipe(exit=code))["id"])
    assert (ended["state"], ended["exit_code"], ended["figures"]) == ("failed", code, None)
    assert "went wrong as asked" in ended["error"]


@pytest.mark.parametrize("wish", [{}, {"deaf": 1}, {"leave": 1}])
def test_cancelling_leaves_no_process(bench: Bench, wish: dict[str, object]) -> None:
    """SIGTERM, then SIGKILL: also for a run that does not listen, and for children in other sessions."""
    job = bench.submit(recipe(pause=30, **wish))["id"]
    bench.until(job, running)
    assert bench.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelling"
    assert bench.until_ended(job)["state"] == "cancelled"
    assert marked(job) == []


def test_a_finished_run_leaves_no_process_either(bench: Bench) -> None:
    """What a run left behind in another session is ended with it."""
    job = bench.submit(recipe(leave=1))["id"]
    assert bench.until_ended(job)["state"] == "succeeded"
    assert marked(job) == []


def test_a_queued_job_is_cancelled_at_once_and_an_ended_one_not(bench: Bench) -> None:
    """Cancelling needs no supervisor while a job waits, and is a conflict once it has ended."""
    job = bench.submit()["id"]
    assert bench.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert bench.http.post(f"/v1/jobs/{job}/cancel").status_code == 409
    bench.supervisor.round()
    assert bench.job(job)["attempts"] == 0


@pytest.mark.parametrize("victim", ["run", "keeper", "all"])
def test_a_killed_process_ends_the_job_and_a_retry_continues(bench: Bench, victim: str) -> None:
    """As where memory runs out: the job fails with the reason, nothing is left, the retry takes up what is done."""
    job = bench.submit(recipe(pause=0.3, layers=4))["id"]
    bench.until(job, lambda found: running(found) and (found["done"] or 0) >= 1)
    keepers = [process for process in marked(job) if "llmprune.service.supervisor.job_runner" in process.cmdline()]
    runs = [process for process in marked(job) if process not in keepers]
    for process in {"run": runs, "keeper": keepers, "all": keepers + runs}[victim]:
        process.kill()
    ended = bench.until_ended(job)
    assert ended["state"] == "failed"
    assert "ended from outside" in ended["error"]
    assert marked(job) == []
    first = (bench.run_folder(job) / "model.partial" / "layer-0").stat().st_mtime_ns
    assert bench.http.post(f"/v1/jobs/{job}/retry").json()["state"] == "queued"
    again = bench.until_ended(job)
    assert (again["state"], again["attempts"], again["error"]) == ("succeeded", 2, None)
    assert (bench.run_folder(job) / "model.partial" / "layer-0").stat().st_mtime_ns == first
    assert not (bench.run_folder(job) / "TWICE").exists()


def test_a_new_supervisor_finds_running_jobs(bench: Bench) -> None:
    """A job outlives its supervisor: the next one looks after it, and starts it no second time."""
    job = bench.submit(recipe(pause=0.2, layers=4))["id"]
    bench.until(job, running)
    bench.supervisor = Supervisor(bench.settings)
    ended = bench.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1)
    assert not (bench.run_folder(job) / "TWICE").exists()


def test_a_job_that_ended_with_the_service_continues(bench: Bench) -> None:
    """After a crash of the whole machine the job is queued again and ends as if nothing had been."""
    job = bench.submit(recipe(pause=0.2, layers=4))["id"]
    bench.until(job, running)
    for process in marked(job):
        process.kill()
    psutil.wait_procs(marked(job), timeout=5)
    bench.supervisor = Supervisor(bench.settings)
    ended = bench.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 2)


def test_a_supervisor_that_dies_while_starting_a_job_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the table's word and the process there is an instant: a job caught there is queued again."""
    job = bench.submit()["id"]
    monkeypatch.setattr(
        bench.supervisor.launchers["local"], "start", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        bench.supervisor.round()
    assert bench.job(job)["state"] == "running"
    bench.supervisor = Supervisor(bench.settings)
    assert bench.until_ended(job)["state"] == "succeeded"


def test_stopping_in_order_puts_jobs_back(bench: Bench) -> None:
    """When the service is stopped, its jobs end and wait for the next one, which continues them."""
    job = bench.submit(recipe(pause=0.2, layers=4))["id"]
    bench.until(job, running)
    bench.supervisor.stop()
    assert bench.job(job)["state"] == "queued"
    assert marked(job) == []
    bench.supervisor = Supervisor(bench.settings)
    assert bench.until_ended(job)["state"] == "succeeded"


def test_time_limit(bench: Bench) -> None:
    """A job that runs longer than its limit is ended, and says so."""
    job = bench.submit(recipe(pause=30), time_limit=0.2)["id"]
    ended = bench.until_ended(job)
    assert ended["state"] == "failed"
    assert "longer than its limit of 0.2 s" in ended["error"]
    assert marked(job) == []


def test_the_time_of_all_attempts_is_shown(bench: Bench) -> None:
    """A short run has its time, a retry adds to what ran before, and its limit begins anew."""
    job = bench.submit(recipe(pause=0.3, exit=1), time_limit=60)["id"]
    first = bench.until_ended(job)
    assert first["ran_seconds"] > 0.3
    with bench.service.database.write() as connection:
        connection.execute("UPDATE jobs SET ran_seconds = 100 WHERE id = ?", (job,))
    bench.http.post(f"/v1/jobs/{job}/retry")
    again = bench.until_ended(job)
    assert (again["state"], again["ran_before"], "limit" in again["error"]) == ("failed", 100, False)
    assert again["ran_seconds"] > 100
    page = bench.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    assert re.search(r"<dd>1 min 4\d s in all attempts, since the last retry [\d.]+ s of at most 1 min 0 s</dd>", page)


def test_a_job_that_has_not_started_did_not_run_for_0_seconds(bench: Bench) -> None:
    """Its page says so in words."""
    job = bench.submit()["id"]
    page = bench.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    assert "<dt>Ran</dt><dd>not yet; at most 24 h 0 min</dd>" in page


def test_a_clock_that_jumps_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits, order and progress go by the monotonic clock and by numbers, not by the time of day."""
    first = bench.submit(recipe(pause=0.2), time_limit=60)["id"]
    bench.until(first, running)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    second = bench.submit()["id"]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    third = bench.submit()["id"]
    assert [bench.until_ended(job)["state"] for job in (first, second, third)] == ["succeeded"] * 3
    listed = [job["id"] for job in bench.http.get("/v1/jobs").json()["jobs"]]
    assert listed == [third, second, first]
    assert bench.job(first)["ran_seconds"] < 30


def test_slots_and_priorities(bench: Bench) -> None:
    """One slot runs one job; the higher priority goes first, then the order of arrival."""
    low, middle, high = (bench.submit(recipe(n=n), priority=n)["id"] for n in (-1, 0, 1))
    ended = {job: bench.until_ended(job) for job in (low, middle, high)}
    assert sorted(ended, key=lambda job: ended[job]["started"]) == [high, middle, low]
    assert ended[low]["started"] >= ended[middle]["finished"]


def test_gpus_are_leased(tmp_path: Path) -> None:
    """GPU jobs get GPUs of their own; the first that must wait is not overtaken by a smaller one; CPU jobs are free."""
    bench = Bench(tmp_path, gpus=("0", "1", "2"))
    two, big, small = (bench.submit(recipe(pause=30, n=n), gpus=n)["id"] for n in (2, 3, 1))
    plain = bench.submit(recipe(pause=30), gpus=0)["id"]
    bench.supervisor.round()
    assert bench.job(two)["devices"] == ["0", "1"]
    assert [bench.job(job)["state"] for job in (big, small, plain)] == ["queued", "queued", "running"]
    bench.until(two, running)
    process = marked(two)[-1]
    assert process.environ()["CUDA_VISIBLE_DEVICES"] == "0,1"
    for job in (two, big, plain, small):
        bench.http.post(f"/v1/jobs/{job}/cancel")
        bench.until_ended(job)


def test_default_is_one_gpu_where_there_is_one(tmp_path: Path) -> None:
    """A GPU machine's jobs ask for one GPU unless they say otherwise, and for no more than there are."""
    bench = Bench(tmp_path, gpus=("0",))
    assert bench.submit()["gpus"] == 1
    answer = bench.http.post("/v1/jobs", content=RECIPE, params={"gpus": 2}, headers=YAML)
    assert (answer.status_code, "this machine has 1" in answer.json()["problems"][0]) == (422, True)


@pytest.mark.parametrize("asked", [{}, {"states": ("failed",)}, {"owner": "ann"}, {"source": "0" * 12}, {"before": 9}])
def test_lists_are_read_from_an_index(bench: Bench, asked: dict[str, Any]) -> None:
    """A page of the list costs the same however many jobs there are: nothing is sorted, nothing else is read."""
    database, asked_for = bench.service.database, []
    database._connection().set_trace_callback(asked_for.append)
    bench.service.jobs.page(**asked, viewer=None)
    database._connection().set_trace_callback(None)
    steps = [row["detail"] for row in database.read(f"EXPLAIN QUERY PLAN {asked_for[0]}")]
    assert len(steps) == 1
    assert steps[0].startswith("SEARCH jobs USING") or (steps == ["SCAN jobs"] and not asked), steps


@pytest.mark.parametrize("asked", [{}, {"states": ("failed",)}, {"owner": "ann"}, {"source": "0" * 12}, {"before": 9}])
def test_lists_for_a_user_are_read_from_indexes(bench: Bench, asked: dict[str, Any]) -> None:
    """The user's own jobs and the shared ones are merged in their order: nothing is sorted, nothing else is read."""
    database, asked_for = bench.service.database, []
    database._connection().set_trace_callback(asked_for.append)
    bench.service.jobs.page(**asked, viewer="bob")
    database._connection().set_trace_callback(None)
    steps = [row["detail"] for row in database.read(f"EXPLAIN QUERY PLAN {asked_for[0]}")]
    assert [steps[at] for at in (0, 1, 3)] == ["MERGE (UNION ALL)", "LEFT", "RIGHT"]
    assert len(steps) == 5, steps
    assert steps[2].startswith("SEARCH jobs USING INDEX")
    assert "USING INDEX" in steps[4]


def test_a_full_disk_ends_one_job_and_not_the_service(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a job's folder cannot be written the job fails with the remedy, and the next runs when there is room."""
    job = bench.submit()["id"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bench.supervisor, "_prepare", full)
        bench.supervisor.round()
    ended = bench.job(job)
    assert (ended["state"], "No space left" in ended["error"]) == ("failed", True)
    bench.http.post(f"/v1/jobs/{job}/retry")
    assert bench.until_ended(job)["state"] == "succeeded"


def test_the_clean_up_keeps_to_the_quota(tmp_path: Path) -> None:
    """Above the quota the oldest model goes first, reports stay, and nothing starts until it holds."""
    bench = Bench(tmp_path, disk_quota=10**9)
    jobs = [bench.submit(recipe(n=n))["id"] for n in range(3)]
    for job in jobs:
        bench.until_ended(job)
        model = bench.run_folder(job) / "model" / "model.safetensors"
        model.write_bytes(os.urandom(1_000_000))
    from llmprune.service.supervisor.cleanup import clean_up, over_quota, used_bytes

    room = bench.settings.model_copy(update={"disk_quota": used_bytes(bench.settings.data_dir / "jobs") - 1_500_000})
    assert over_quota(room)
    clean_up(room, bench.service.jobs)
    assert not over_quota(room)
    assert [(bench.run_folder(job) / "model").exists() for job in jobs] == [False, False, True]
    assert [bench.job(job)["cleaned"] for job in jobs] == [True, True, False]
    assert all((bench.run_folder(job) / "report.json").exists() for job in jobs)


def test_the_mark_is_in_every_process(bench: Bench) -> None:
    """A job's processes carry its id in their environment: that is how they are found after any crash."""
    job = bench.submit(recipe(pause=30))["id"]
    bench.until(job, running)
    found = marked(job)
    assert len(found) == 2
    assert all(process.environ()[MARK] == job for process in found)
    for process in found:
        process.send_signal(signal.SIGKILL)
    bench.until_ended(job)


def test_a_job_deleted_between_two_looks_is_not_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """404 for the job that another request deleted meanwhile; 500 for a KeyError, which is a mistake of the service."""
    job = bench.submit()["id"]
    bench.http.post(f"/v1/jobs/{job}/cancel")
    found = bench.service.jobs.get(job)
    bench.service.jobs.delete(job)
    monkeypatch.setattr(bench.service.jobs, "get", lambda _: found)
    for change in ("cancel", "retry"):
        answer = bench.http.post(f"/v1/jobs/{job}/{change}")
        assert (answer.status_code, answer.json()["detail"]) == (404, f"there is no job '{job}'")
    assert bench.http.delete(f"/v1/jobs/{job}").status_code == 404
    monkeypatch.setattr(bench.service.jobs, "get", lambda name: {}[name])
    assert bench.http.get(f"/v1/jobs/{job}").status_code == 500
