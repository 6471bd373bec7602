"""One damaged row, report, progress file or answer stops no other job, no list and no supervisor."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from helpers.service import FAKE, ServiceHarness, recipe

from llmprune.common.errors import LLMPruneError
from llmprune.service.supervisor.launchers.base import UNKNOWN, Launch
from llmprune.service.supervisor.launchers.ray import Ray, RayTiming


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A service with two slots and fake runs."""
    return ServiceHarness(tmp_path, slots=2)


def damage(harness: ServiceHarness, job: str, column: str, value: object) -> None:
    """Store a value in a job's row that the service never writes."""
    with harness.service.database.write() as connection:
        stored = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"  # text that is no UTF-8
        connection.execute(f"UPDATE jobs SET {column} = {stored} WHERE id = ?", (value, job))


def test_infinite_figures_are_stored_and_shown(harness: ServiceHarness) -> None:
    """An infinite perplexity in a report reads back from the table, over HTTP as "Infinity", on the pages as ∞."""
    jobs = [harness.submit(recipe(n=n, figure=figure))["id"] for n, figure in enumerate(("Infinity", "NaN"))]
    found = [harness.until_ended(job) for job in jobs]
    assert [one["figures"]["perplexity"] for one in found] == [[10.0, "Infinity"], [10.0, "NaN"]]
    assert harness.http.get("/v1/jobs").status_code == 200
    compared = harness.http.get("/v1/compare", params={"job": jobs}).json()["jobs"]
    assert [one["figures"]["perplexity"][1] for one in compared] == ["Infinity", "NaN"]
    assert harness.http.get("/", headers={"Accept": "text/html"}).status_code == 200
    assert "∞" in harness.http.get("/compare", params={"job": jobs}, headers={"Accept": "text/html"}).text
    schema = harness.http.get("/v1/openapi.json").json()["components"]["schemas"]["Figures"]["properties"]["perplexity"]
    assert "Infinity" in json.dumps(schema)


@pytest.mark.parametrize(
    ("column", "value", "state"),
    [
        ("overrides", "[1, {", "queued"), ("gpus", "many", "running"), ("name", b"\xff\xfe", "queued"),
        ("fraction", float("inf"), "running"), ("push", "[]", "queued"), ("recipe", b"\xff", "queued"),
    ],
)  # fmt: skip
def test_a_damaged_row_fails_its_job_alone(tmp_path: Path, column: str, value: object, state: str) -> None:
    """The list and its page answer, the job fails with the column's name, and the other job finishes."""
    harness = ServiceHarness(tmp_path, slots=2, database_url=None)  # PostgreSQL stores no such values
    bad = harness.submit(recipe(pause=30))["id"]
    if state == "running":
        harness.until(bad, lambda found: found["state"] == "running")
    damage(harness, bad, column, value)
    good = harness.submit(recipe(n=1))["id"]
    assert harness.http.get("/v1/jobs").status_code == 200
    assert harness.http.get("/", headers={"Accept": "text/html"}).status_code == 200
    assert harness.until_ended(good)["state"] == "succeeded"
    ended = harness.until_ended(bad)
    assert (ended["state"], f"damaged ({column})" in ended["error"]) == ("failed", True)
    assert harness.http.get(f"/jobs/{bad}", headers={"Accept": "text/html"}).status_code == 200


@pytest.mark.parametrize("figures", ["{", "[]", '{"parameters": [1]}', '"x"', "[" * 100_000])
def test_damaged_figures_are_left_out(harness: ServiceHarness, figures: str) -> None:
    """Figures that cannot be read are null, and the rest of the job is shown."""
    job = harness.submit()["id"]
    harness.until_ended(job)
    damage(harness, job, "figures", figures)
    listed = harness.http.get("/v1/jobs").json()["jobs"][0]
    assert (listed["id"], listed["state"], listed["figures"]) == (job, "succeeded", None)


@pytest.mark.parametrize(
    "told",
    ['{"step": 1, "done": 0, "total": 2, "seconds": 1}', '{"step": "x", "done": "a", "total": 2, "seconds": 1}', "[]",
     '{"step": "x", "done": 1, "total": 99999999999999999999999, "seconds": 1}', "[" * 8_000,
     '{"step": "pass 1", "done": 1, "total": 2, "seconds": NaN}'],
)  # fmt: skip
def test_a_damaged_progress_file_is_ignored(harness: ServiceHarness, told: str) -> None:
    """A progress file of another shape is ignored; the job and another one finish."""
    odd, plain = harness.submit(recipe(told=told.replace("\n", ""), pause=0.2))["id"], harness.submit(recipe(n=1))["id"]
    assert harness.until_ended(plain)["state"] == "succeeded"
    assert harness.until_ended(odd)["state"] == "succeeded"


@pytest.mark.parametrize("report", ["{", "[]", '{"dense": null}', "[" * 20_000])
def test_a_job_with_a_damaged_report_succeeds_without_figures(harness: ServiceHarness, report: str) -> None:
    """The job succeeds without figures, its report is 404 with the reason, and the next job runs."""
    job = harness.submit(recipe(report=report))["id"]
    ended = harness.until_ended(job)
    assert (ended["state"], ended["figures"]) == ("succeeded", None)
    answer = harness.http.get(f"/v1/jobs/{job}/report")
    assert answer.status_code in (200, 404)
    assert answer.status_code == (200 if report == '{"dense": null}' else 404)
    assert harness.until_ended(harness.submit(recipe(n=2))["id"])["state"] == "succeeded"


def test_an_error_about_one_job_is_logged_once_and_fails_it(
    harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the launcher fails the job with a message; a temporary one is logged once and tried again."""
    bad, good = harness.submit(recipe(pause=1))["id"], harness.submit(recipe(pause=0.5, n=1))["id"]
    harness.until(bad, lambda found: found["state"] == "running")
    local = harness.supervisor.launchers["local"]
    plain = local.poll

    def poll(launch: Launch) -> Any:
        if launch.job == bad:
            raise error
        return plain(launch)

    error: Exception = OSError(28, "No space left on device")
    monkeypatch.setattr(local, "poll", poll)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            harness.supervisor.round()
    assert len([one for one in caplog.records if "No space left" in one.message]) == 1
    assert harness.job(bad)["state"] == "running"
    error = KeyError("state")
    harness.supervisor.round()
    ended = harness.job(bad)
    assert (ended["state"], "cannot continue it: KeyError: 'state'" in ended["error"]) == ("failed", True)
    assert harness.until_ended(good)["state"] == "succeeded"


def test_a_job_whose_folder_is_gone_fails(harness: ServiceHarness) -> None:
    """A job whose folder is removed while it runs fails with the reason, and another one finishes."""
    bad, good = harness.submit(recipe(pause=30))["id"], harness.submit(recipe(pause=0.3, n=1))["id"]
    harness.until(bad, lambda found: found["state"] == "running")
    shutil.rmtree(harness.settings.folder(bad))
    assert harness.until_ended(good)["state"] == "succeeded"
    ended = harness.until_ended(bad)
    assert (ended["state"], str(harness.settings.data_dir) in ended["error"]) == ("failed", False)


HTML = httpx.Response(200, text="<html>log in</html>", headers={"Content-Type": "text/html"})
REDIRECT = httpx.Response(302, headers={"Location": "https://login.example.org/"})


@pytest.mark.parametrize("answer", [HTML, REDIRECT, httpx.Response(200, text="[" * 100_000)])
def test_an_answer_that_is_not_rays_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: httpx.Response
) -> None:
    """After a page or a redirect the capacity is 0, the state of jobs is unknown, and one warning gives the reason."""
    transport = httpx.MockTransport(lambda _: answer)
    launcher = Ray("http://head:8265", FAKE, grace=1.0, timing=RayTiming(pause=0.0), transport=transport)
    launch = Launch("0123456789ab", 1, tmp_path, ("run",), 0, (), {})
    with caplog.at_level(logging.WARNING):
        assert launcher.capacity() == 0
        launcher.start(launch)
        assert launcher.poll(launch) == UNKNOWN
        launcher.stop(launch, force=True)
    assert len(caplog.records) == 1
    assert "as --ray" in caplog.text


@pytest.mark.parametrize(
    "details",
    [[], {"status": "DANCING"}, {"status": "FAILED", "driver_exit_code": "three"},
     {"status": "SUCCEEDED", "driver_exit_code": 10**30}],
)  # fmt: skip
def test_a_state_that_ray_does_not_have_fails_that_job_alone(tmp_path: Path, details: object) -> None:
    """JSON of other types about one job fails it with the reason; a job on the same cluster succeeds."""
    harness = ServiceHarness(tmp_path, ray="http://head:8265")
    jobs = [harness.submit(recipe(n=n), launcher="ray")["id"] for n in range(2)]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith(f"/api/jobs/llmprune-{jobs[0]}"):
            return httpx.Response(200, json=details)
        if request.url.path.startswith("/api/jobs/llmprune-"):
            return httpx.Response(200, json={"status": "SUCCEEDED", "driver_exit_code": 0})
        return httpx.Response(200, json={})

    harness.supervisor.launchers["ray"] = Ray(
        "http://head:8265", FAKE, grace=1.0, transport=httpx.MockTransport(answer)
    )
    ended = [harness.until_ended(job) for job in jobs]
    assert [one["state"] for one in ended] == ["failed", "succeeded"]
    assert "no state of a job" in ended[0]["error"]


def test_a_cluster_that_breaks_stops_no_job_of_this_machine(
    harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of this machine run although the launcher raises an error when it is asked for its capacity."""
    broken = ServiceHarness(harness.settings.data_dir.parent / "other", ray="http://head:8265")
    away, here = broken.submit(recipe(n=1), launcher="ray")["id"], broken.submit(recipe(n=2))["id"]

    def capacity() -> int:
        raise LLMPruneError("its capacity cannot be read")

    monkeypatch.setattr(broken.supervisor.launchers["ray"], "capacity", capacity)
    assert broken.until_ended(here)["state"] == "succeeded"
    assert broken.job(away)["state"] == "queued"
