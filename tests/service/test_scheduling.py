"""Order, slots, GPUs, limits and the clean-up: which jobs run, when and for how long."""

from __future__ import annotations

import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.service.jobs.job import JobQuery
from llmprune.service.supervisor.cleanup import clean_up, over_quota, used_bytes
from llmprune.service.supervisor.processes import processes_of_job


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path)


def running(job: dict[str, object]) -> bool:
    """Return whether a job's process has written its progress."""
    return job["state"] == "running" and job["total"] is not None


def test_time_limit(harness: ServiceHarness) -> None:
    """A job that runs longer than its limit is ended, and says so."""
    job = harness.submit(recipe(pause=30), time_limit=0.2)["id"]
    ended = harness.until_ended(job)
    assert ended["state"] == "failed"
    assert "longer than its limit of 0.2 s" in ended["error"]
    assert processes_of_job(job) == []


def test_the_time_of_all_attempts_is_shown(harness: ServiceHarness) -> None:
    """A retry adds to the run time of earlier attempts, and its limit counts from zero."""
    job = harness.submit(recipe(pause=0.3, exit=1), time_limit=60)["id"]
    first = harness.until_ended(job)
    assert first["ran_seconds"] > 0.3
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET ran_seconds = 100 WHERE id = ?", (job,))
    harness.http.post(f"/v1/jobs/{job}/retry")
    again = harness.until_ended(job)
    assert (again["state"], again["ran_before"], "limit" in again["error"]) == ("failed", 100, False)
    assert again["ran_seconds"] > 100
    page = harness.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    assert re.search(r"<dd>1 min 4\d s in all attempts, since the last retry [\d.]+ s of at most 1 min 0 s</dd>", page)


def test_a_job_that_has_not_started_shows_no_run_time(harness: ServiceHarness) -> None:
    """The page of a job that has not started shows no run time."""
    job = harness.submit()["id"]
    page = harness.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    assert "<dt>Ran</dt><dd>not yet; at most 24 h 0 min</dd>" in page


def test_a_clock_that_jumps_changes_nothing(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits, order and progress depend on the monotonic clock and on numbers, not on the time of day."""
    first = harness.submit(recipe(pause=0.2), time_limit=60)["id"]
    harness.until(first, running)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    second = harness.submit()["id"]
    monkeypatch.setattr(time, "time", lambda: 0.0)
    third = harness.submit()["id"]
    assert [harness.until_ended(job)["state"] for job in (first, second, third)] == ["succeeded"] * 3
    listed = [job["id"] for job in harness.http.get("/v1/jobs").json()["jobs"]]
    assert listed == [third, second, first]
    assert harness.job(first)["ran_seconds"] < 30


def test_slots_and_priorities(harness: ServiceHarness) -> None:
    """One slot runs one job at a time, by priority, then in order of arrival."""
    low, middle, high = (harness.submit(recipe(n=n), priority=n)["id"] for n in (-1, 0, 1))
    ended = {job: harness.until_ended(job) for job in (low, middle, high)}
    assert sorted(ended, key=lambda job: ended[job]["started"]) == [high, middle, low]
    assert ended[low]["started"] >= ended[middle]["finished"]


def test_gpus_are_leased(tmp_path: Path) -> None:
    """Each GPU job gets its own GPUs; no smaller job overtakes one that waits for GPUs; CPU jobs do not wait."""
    harness = ServiceHarness(tmp_path, gpus=("0", "1", "2"))
    two, big, small = (harness.submit(recipe(pause=30, n=n), gpus=n)["id"] for n in (2, 3, 1))
    plain = harness.submit(recipe(pause=30), gpus=0)["id"]
    harness.supervisor.round()
    assert harness.job(two)["devices"] == ["0", "1"]
    assert [harness.job(job)["state"] for job in (big, small, plain)] == ["queued", "queued", "running"]
    harness.until(two, running)
    process = processes_of_job(two)[-1]
    assert process.environ()["CUDA_VISIBLE_DEVICES"] == "0,1"
    for job in (two, big, plain, small):
        harness.http.post(f"/v1/jobs/{job}/cancel")
        harness.until_ended(job)


def test_default_is_one_gpu_where_there_is_one(tmp_path: Path) -> None:
    """On a machine with GPUs a job gets one by default, and cannot ask for more than there are."""
    harness = ServiceHarness(tmp_path, gpus=("0",))
    assert harness.submit()["gpus"] == 1
    answer = harness.http.post("/v1/jobs", content=RECIPE, params={"gpus": 2}, headers=YAML)
    assert (answer.status_code, "this machine has 1" in answer.json()["problems"][0]) == (422, True)
    answer = harness.http.post("/v1/jobs", content=f"devices: [1]\n{RECIPE}", headers=YAML)
    said = "devices: needs 2 GPUs and the job has 1; leave devices out or raise gpus"
    assert (answer.status_code, answer.json()["problems"]) == (422, [said])


@pytest.mark.parametrize("asked", [{}, {"states": ("failed",)}, {"owner": "ann"}, {"source": "0" * 12}, {"before": 9}])
def test_lists_are_read_from_an_index(tmp_path: Path, asked: dict[str, Any]) -> None:
    """A page of the list is read from one index, without a sort, however many jobs there are."""
    harness = ServiceHarness(tmp_path, database_url=None)
    database, asked_for = harness.service.database, []
    database.connection().set_trace_callback(asked_for.append)
    harness.service.jobs.page(JobQuery(None, **asked))
    database.connection().set_trace_callback(None)
    steps = [row["detail"] for row in database.read(f"EXPLAIN QUERY PLAN {asked_for[0]}")]
    assert len(steps) == 1
    assert steps[0].startswith("SEARCH jobs USING") or (steps == ["SCAN jobs"] and not asked), steps


@pytest.mark.parametrize("asked", [{}, {"states": ("failed",)}, {"owner": "ann"}, {"source": "0" * 12}, {"before": 9}])
def test_lists_for_a_user_are_read_from_indexes(tmp_path: Path, asked: dict[str, Any]) -> None:
    """A user's own jobs and shared ones are read from two indexes, each without a sort."""
    harness = ServiceHarness(tmp_path, database_url=None)
    database, asked_for = harness.service.database, []
    database.connection().set_trace_callback(asked_for.append)
    harness.service.jobs.page(JobQuery("bob", **asked))
    database.connection().set_trace_callback(None)
    steps = [row["detail"] for row in database.read(f"EXPLAIN QUERY PLAN {asked_for[0]}")]
    reads = [step for step in steps if " jobs " in step]
    assert len(reads) == 2, steps
    assert reads[0].startswith("SEARCH jobs USING INDEX")
    assert "USING INDEX" in reads[1]
    after = [after for read, after in itertools.pairwise(steps) if " jobs " in read]
    assert after == ["SCAN half_0", "SCAN half_1"]  # only the few rows of a half are sorted


def test_the_clean_up_keeps_to_the_quota(tmp_path: Path) -> None:
    """Above the quota the oldest models are deleted, reports are kept, and no job starts until the quota holds."""
    harness = ServiceHarness(tmp_path, disk_quota=10**9, database_url=None)
    jobs = [harness.submit(recipe(n=n))["id"] for n in range(3)]
    for job in jobs:
        harness.until_ended(job)
        quantized = harness.run_folder(job) / "quantized"  # counts as the model does
        quantized.mkdir()
        for place in (harness.run_folder(job) / "model", quantized):
            (place / "model.safetensors").write_bytes(os.urandom(500_000))
    tight = harness.settings.model_copy(
        update={"disk_quota": used_bytes(harness.settings.data_dir / "jobs") - 1_500_000}
    )
    assert over_quota(tight)
    clean_up(tight, harness.service.jobs)
    assert not over_quota(tight)
    read: list[str] = []
    harness.service.database.connection().set_trace_callback(read.append)
    assert not clean_up(tight, harness.service.jobs)
    assert read == []  # below the quota it asks for no job
    clean_up(tight.model_copy(update={"keep_days": 9.0}), harness.service.jobs)
    harness.service.database.connection().set_trace_callback(None)
    steps = harness.service.database.read(f"EXPLAIN QUERY PLAN {read[-1]}")
    assert "SEARCH jobs USING INDEX jobs_to_clean" in steps[0]["detail"]
    for name in ("model", "quantized"):
        assert [(harness.run_folder(job) / name).exists() for job in jobs] == [False, False, True]
    assert [harness.job(job)["cleaned"] for job in jobs] == [True, True, False]
    assert all((harness.run_folder(job) / "report.json").exists() for job in jobs)
