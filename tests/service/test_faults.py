"""The service on a full disk."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, read_only, recipe

from llmprune.service.database.database import DatabaseUnavailable
from llmprune.service.ongoing_fault import OngoingFault
from llmprune.service.supervisor.__main__ import attempt_round


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, mounted for the test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path) -> Path:
    """Fill the file system."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def go_round(harness: ServiceHarness, times: int = 1) -> None:
    """Run a round as the supervisor's process does: an error of a full disk is not raised."""
    for _ in range(times):
        with contextlib.suppress(DatabaseUnavailable, OSError):
            harness.supervisor.round()


def test_a_full_disk_refuses_what_is_new_and_loses_nothing(small_disk: Path) -> None:
    """New jobs are refused with 507 and leave nothing, jobs can be read, and with free space all continues."""
    harness = ServiceHarness(small_disk, database_url=None)
    done, waiting = harness.submit(recipe(n=0))["id"], harness.submit(recipe(n=1))["id"]
    harness.until_ended(done)
    ballast = fill(small_disk)
    answers = [harness.http.post("/v1/jobs", content=RECIPE, headers=YAML) for _ in range(40)]
    refused = [answer for answer in answers if answer.status_code != 201]
    assert {answer.status_code for answer in refused} == {507}
    assert all("full" in answer.text or "No space" in answer.text for answer in refused)
    assert harness.http.get("/v1/jobs").status_code == 200
    assert harness.job(done)["state"] == "succeeded"
    go_round(harness, 3)
    assert harness.http.get("/v1/health").status_code == 200
    ballast.unlink()
    if harness.until_ended(waiting)["state"] == "failed":  # it may have started on the full disk
        assert harness.http.post(f"/v1/jobs/{waiting}/retry").status_code == 200
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    assert {harness.until_ended(job)["state"] for job in (waiting, harness.submit(recipe(n=2))["id"])} == {"succeeded"}
    found = {job["id"] for job in harness.http.get("/v1/jobs", params={"limit": 500}).json()["jobs"]}
    assert found >= {done, waiting, *accepted}
    assert len(found) == 3 + len(accepted)
    assert {folder.name for folder in (small_disk / "data" / "jobs").iterdir()} <= found


def test_a_job_table_that_cannot_be_written_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged when it begins, each hour while it lasts, and when it is over; running jobs are followed."""
    harness, now = ServiceHarness(tmp_path, database_url=None), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    fault = OngoingFault(logging.getLogger("service"), "the job table cannot be used")

    def rounds(seconds: int) -> list[str]:
        caplog.clear()
        for _ in range(seconds):
            now[0] += 1.0
            attempt_round(harness.supervisor, fault)
        return caplog.messages

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        read_only(patch, harness.service.database)
        assert rounds(60) == ["the job table cannot be used (attempt to write a readonly database); trying again"]
        now[0] += 3600
        assert rounds(60) == ["the job table cannot be used for 1.0 hours (attempt to write a readonly database)"]
    with caplog.at_level(logging.INFO):
        assert rounds(60) == ["no longer: the job table cannot be used (attempt to write a readonly database)"]
