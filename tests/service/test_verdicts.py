"""Gate verdicts as states of jobs, evaluation of more samples, and when a retry is offered."""

from __future__ import annotations

import sqlite3
from importlib.resources import files
from pathlib import Path

import httpx2 as httpx
import pytest
from helpers.commands import command
from helpers.service import ServiceHarness, answer_requests, recipe

from llmprune.service.database.sqlite import SqliteDatabase
from llmprune.service.jobs.job import JobQuery
from llmprune.service.jobs.store import JobStore
from llmprune.service.supervisor.cleanup import remove_products

UNDECIDED = {"exit": 3, "verdict": "not enough samples"}


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path)


def page(harness: ServiceHarness, job: str) -> str:
    """Return the job's page as text."""
    text: str = harness.http.get(f"/jobs/{job}", headers={"Accept": "text/html"}).text
    return text


@pytest.mark.parametrize(
    ("verdict", "state", "words"),
    [
        ("fail", "gate_not_met", "The gate is not met"),
        ("not enough samples", "gate_undecided", "The gate is undecided"),
        ("no interval", "gate_undecided", "The gate is undecided"),
    ],
)
def test_a_gate_that_is_not_met_is_a_result(harness: ServiceHarness, verdict: str, state: str, words: str) -> None:
    """Lists, filters, counts, metrics and page show the verdict; the model is available, a retry is not."""
    job = harness.submit(recipe(exit=3, verdict=verdict))["id"]
    ended = harness.until_ended(job)
    assert (ended["state"], ended["exit_code"], ended["figures"]["gate_verdict"]) == (state, 3, verdict)
    listed = harness.http.get("/v1/jobs", params={"state": state}).json()
    assert ([one["id"] for one in listed["jobs"]], listed["counts"][state]) == ([job], 1)
    assert f'llmprune_jobs{{state="{state}"}} 1.0' in harness.http.get("/v1/metrics").text
    assert harness.http.get(f"/v1/jobs/{job}/artifacts/model/model.safetensors").status_code == 200
    shown = page(harness, job)
    assert words in shown
    assert "Why it failed" not in shown
    assert f"/jobs/{job}/retry" not in shown
    assert f"/jobs/{job}/reevaluate" in shown
    assert state.replace("_", " ") in harness.http.get("/", headers={"Accept": "text/html"}).text
    refused = harness.http.post(f"/v1/jobs/{job}/retry")
    assert (refused.status_code, "has its result" in refused.json()["detail"]) == (409, True)


@pytest.mark.parametrize(
    ("wish", "offered"),
    [
        ({"exit": 1}, True),
        ({"exit": 2}, False),
        ({}, False),
        (UNDECIDED, False),
        (UNDECIDED | {"more_exit": 2}, True),
    ],
)
def test_retry_is_offered_where_it_can_help(harness: ServiceHarness, wish: dict[str, object], offered: bool) -> None:
    """A retry is offered after a fault, and neither for a result nor for a wrong recipe."""
    job = harness.submit(recipe(**wish))["id"]
    harness.until_ended(job)
    if "more_exit" in wish:  # the recipe has made a model, so it is not what is wrong
        harness.http.post(f"/v1/jobs/{job}/reevaluate")
        assert harness.until_ended(job)["exit_code"] == 2
    assert (f"/jobs/{job}/retry" in page(harness, job)) == offered


def test_more_samples_decide_the_gate(harness: ServiceHarness) -> None:
    """The model is evaluated on as many samples as the gate needs or the caller asks; the recipe is not run again."""
    job = harness.submit(recipe(**UNDECIDED))["id"]
    harness.until_ended(job)
    written = (harness.run_folder(job) / "model" / "model.safetensors").stat().st_mtime_ns
    (harness.run_folder(job) / "arguments.json").unlink()
    again = harness.http.post(f"/v1/jobs/{job}/reevaluate")
    assert (again.status_code, again.json()["state"], again.json()["reevaluate"]) == (200, "queued", 200)
    ended = harness.until_ended(job)
    assert (ended["state"], ended["error"], ended["reevaluate"]) == ("succeeded", None, None)
    assert ended["figures"]["gate_verdict"] == "pass"
    assert "evaluating 200 samples" in harness.http.get(f"/v1/jobs/{job}/log").text
    assert (harness.run_folder(job) / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert not (harness.run_folder(job) / "arguments.json").exists()
    assert harness.http.get(f"/v1/jobs/{job}/report").json()["recipe"]["evaluation"]["limit"] == 200
    answers = [harness.http.post(f"/v1/jobs/{job}/reevaluate", params=one) for one in ({}, {"limit": 200})]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert (
        harness.http.post(f"/jobs/{job}/reevaluate", data={"limit": "300"}, follow_redirects=False).status_code == 303
    )
    assert harness.job(job)["reevaluate"] == 300


def test_an_evaluation_that_stops_keeps_the_verdict(harness: ServiceHarness) -> None:
    """A cancelled evaluation restores the earlier verdict; after a fault a retry evaluates and does not prune."""
    job = harness.submit(recipe(**UNDECIDED, more_pause=30))["id"]
    sentence = harness.until_ended(job)["error"]
    for rounds in (0, 1):
        harness.http.post(f"/v1/jobs/{job}/reevaluate")
        if rounds:
            harness.until(job, lambda found: found["state"] == "running")
        harness.http.post(f"/v1/jobs/{job}/cancel")
        ended = harness.until_ended(job)
        assert (ended["state"], ended["error"], ended["reevaluate"]) == ("gate_undecided", sentence, None)
    broken = harness.submit(recipe(**UNDECIDED, more_exit=1))["id"]
    harness.until_ended(broken)
    harness.http.post(f"/v1/jobs/{broken}/reevaluate")
    failed = harness.until_ended(broken)
    assert (failed["state"], failed["figures"]["gate_verdict"]) == ("failed", "not enough samples")
    assert f"/jobs/{broken}/retry" in page(harness, broken)
    harness.http.post(f"/v1/jobs/{broken}/retry")
    harness.until_ended(broken)
    assert harness.http.get(f"/v1/jobs/{broken}/log").text.count("evaluating 200 samples") == 2


def test_what_cannot_be_evaluated_again(harness: ServiceHarness) -> None:
    """A job without a finished model, or with a deleted one, gives 409 with the reason."""
    failed, done = harness.submit(recipe(exit=1))["id"], harness.submit(recipe(n=1))["id"]
    harness.until_ended(failed)
    harness.until_ended(done)
    harness.service.jobs.clean(done, lambda: None)
    for job, said in ((failed, "is failed"), (done, "the clean-up")):
        answer = harness.http.post(f"/v1/jobs/{job}/reevaluate", params={"limit": 500})
        assert (answer.status_code, said in answer.json()["detail"]) == (409, True)
        assert "Evaluate more samples" not in page(harness, job)


def test_a_retry_after_the_clean_up_runs_the_recipe(harness: ServiceHarness) -> None:
    """A retry after the model was deleted makes the model again, which can then be pushed and deleted again."""
    job = harness.submit(recipe(**UNDECIDED, more_exit=1))["id"]
    harness.until_ended(job)
    harness.http.post(f"/v1/jobs/{job}/reevaluate")
    assert harness.until_ended(job)["state"] == "failed"
    remove_products(harness.settings, harness.service.jobs, job=job)
    again = harness.http.post(f"/v1/jobs/{job}/retry").json()
    assert (again["cleaned"], again["reevaluate"]) == (False, None)
    assert harness.until_ended(job)["state"] == "gate_undecided"
    assert (harness.run_folder(job) / "model" / "model.safetensors").is_file()


def test_watching_ends_with_the_gates_code(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """``watch`` and ``reevaluate-job`` exit with 3 for a gate that is undecided, and with 0 once it is met."""
    job = harness.submit(recipe(**UNDECIDED))["id"]
    harness.until_ended(job)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):  # a stream that ends with the job
            harness.until_ended(job)
        return harness.http._transport.handle_request(request)

    answer_requests(monkeypatch, answer)
    watched = command("watch", job)
    assert (watched.code, "gate undecided" in watched.err) == (3, True), watched.err
    assert command("reevaluate-job", job, "--limit", "400").code == 0


def test_jobs_of_an_earlier_schema_get_their_verdicts(tmp_path: Path) -> None:
    """The migration keeps rows, events and indexes, and restores verdicts and infinite figures."""
    path = tmp_path / "old.sqlite3"
    old = sqlite3.connect(path)
    steps = sorted(files("llmprune.service.database").joinpath("migrations").iterdir(), key=lambda file: file.name)
    for step in steps[:5]:
        old.executescript(step.read_text(encoding="utf-8"))
    figures = '{"parameters":[2,1],"bytes":[2,1],"layers":[2,1],"perplexity":[10.5,null]}'
    rows = [
        ("met", "succeeded", 0, None, figures), ("missed", "failed", 3, "the gate is not met: x", figures),
        ("open", "failed", 3, "the gate is undecided: x", figures), ("broken", "failed", 1, "x", None),
    ]  # fmt: skip
    for name, state, code, error, kept in rows:
        old.execute(
            "INSERT INTO jobs (id, owner, name, model, recipe, overrides, launcher, gpus, priority, state, exit_code,"
            " error, figures, created) VALUES (?, 'ann', 'n', 'm', 'r', '[]', 'local', 0, 0, ?, ?, ?, ?, 1.0)",
            (name, state, code, error, kept),
        )
        old.execute("INSERT INTO events (job, kind, data, at) VALUES (?, 'state', '{}', 1.0)", (name,))
    old.execute("PRAGMA user_version = 5")
    old.commit()
    old.close()
    database = SqliteDatabase(path)
    database.migrate()
    jobs = JobStore(database)
    found = {job.id: job for job in jobs.page(JobQuery(viewer=None)).jobs}
    assert {name: job.state for name, job in found.items()} == {
        "met": "succeeded", "missed": "gate_not_met", "open": "gate_undecided", "broken": "failed",
    }  # fmt: skip
    assert found["met"].figures is not None
    assert found["met"].figures.perplexity == (10.5, float("inf"))
    assert all(len(jobs.events(name, 0)) == 1 for name in found)
