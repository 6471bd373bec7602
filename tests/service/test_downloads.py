"""Downloads of a job's files: one folder holds the files of one job."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import httpx2 as httpx
import pytest
from helpers.service_answers import ENDED, JOB, OTHER, page, talking_to

from llmprune.common.errors import OutputError


class Results:
    """A service with two ended jobs, each with one file."""

    def __init__(self) -> None:
        self.finished: float | None = 5.0
        self.sent = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer the requests of fetch."""
        job = request.url.path.split("/")[3]
        if request.url.path.endswith("/artifacts"):
            return page(json.dumps([{"name": "report.json", "bytes": 12}]).encode())
        if request.url.path.endswith("/report.json"):
            self.sent += 1
            return page(job.encode())
        if request.url.path.endswith("/checksums"):
            return page(json.dumps({"report.json": hashlib.sha256(job.encode()).hexdigest()}).encode())
        state = "running" if self.finished is None else "succeeded"
        return page(json.dumps(ENDED | {"id": job, "finished": self.finished, "state": state}).encode())


def test_a_folder_holds_the_files_of_one_job(tmp_path: Path) -> None:
    """Files of a second job, of a retried job and of unknown origin are never mixed or replaced."""
    folder, results = tmp_path / "out", Results()
    with talking_to(results) as client:
        assert client.job(JOB).fetch(folder) == client.job(JOB).fetch(folder) == [folder / "report.json"]
        assert results.sent == 1  # whole files are not fetched again
        with pytest.raises(OutputError, match=f"has the files of job {JOB}; choose another --output"):
            client.job(OTHER).fetch(folder)
        results.finished = 6.0
        with pytest.raises(OutputError, match="from before it ended last"):
            client.job(JOB).fetch(folder)
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "report.json").write_text("mine")
        with pytest.raises(OutputError, match="no record of which job it belongs to"):
            client.job(JOB).fetch(tmp_path / "old")
    assert (folder / "report.json").read_text() == JOB
    assert (tmp_path / "old" / "report.json").read_text() == "mine"


def test_files_of_a_running_job_are_fetched_again(tmp_path: Path) -> None:
    """Files of a running job are downloaded again, because they may change."""
    results = Results()
    results.finished = None
    with talking_to(results) as client:
        for _ in range(2):
            client.job(JOB).fetch(tmp_path / "out")
    assert results.sent == 2
