"""Pushes of finished jobs to the hub, each with a token of its own."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.commands import command, save_model, verify_here, write_recipe, write_text
from helpers.hub.server import Hub
from helpers.hub.state import TOKEN
from helpers.service import ServiceHarness, recipe

from llmprune.service.supervisor.cleanup import clean_up
from llmprune.service.supervisor.devices import MAX_PUSHES
from llmprune.service.supervisor.processes import processes_of_job

SECRET = "hf_" + "0nlyF0rThisPush" * 2
HEADERS = {"X-Hub-Token": SECRET}
REPO = {"repo_id": "org/pruned"}


@pytest.fixture
def harness(tmp_path: Path) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServiceHarness, str]:
    """A service with a finished job."""
    harness = ServiceHarness(tmp_path_factory.mktemp("done"))
    return harness, finished(harness)


def finished(harness: ServiceHarness, **wishes: object) -> str:
    """Run a job to its end and return its id."""
    job = harness.submit(recipe(**wishes))["id"]
    harness.until_ended(job)
    return str(job)


def push(harness: ServiceHarness, job: str, **settings: Any) -> str:
    """Submit a push of a job's model and return its id."""
    answer = harness.http.post(f"/v1/jobs/{job}/push", json=REPO | settings, headers=HEADERS)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json()['id']}"
    return str(answer.json()["id"])


def refused(harness: ServiceHarness, path: str, status: int, said: str, **request: Any) -> None:
    """Assert that a request is refused with a status and a message."""
    answer = harness.http.post(f"/v1/jobs/{path}", **({"json": REPO, "headers": HEADERS} | request))
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


def test_a_push_is_a_job_whose_result_can_be_had(harness: ServiceHarness) -> None:
    """A push gets exactly the settings that were sent, reports its commit, and is listed with its source."""
    job = finished(harness)
    wanted = {"branch": "v2", "when": "always", "commit_message": "--public oh", "quantized_repo_id": "auto"}
    pushed = push(harness, job, private=False, **wanted)
    ended = harness.until_ended(pushed)
    assert (ended["state"], ended["source"], ended["name"]) == ("succeeded", job, "push to org/pruned")
    assert ended["published"]["url"] == "https://hub/org/pruned/commit/c0ffee"
    assert ended["published"]["quantized"]["url"] == "https://hub/org/pruned-fp8/commit/c0ffee"
    assert ended["push"] == {"repo_id": "org/pruned", "private": False, "create_pr": False} | wanted
    argv = json.loads((harness.run_folder(pushed) / "arguments.json").read_text())["argv"]
    assert argv[:2] == ["push", str(harness.run_folder(job).absolute())]
    assert {"--repo-id=org/pruned", "--public", "--branch=v2", "--commit-message=--public oh"} < set(argv)
    assert "--quantized-repo-id=auto" in argv
    page = harness.http.get(f"/jobs/{pushed}").text
    assert all(f"https://hub/org/{name}/commit" in page for name in ("pruned", "pruned-fp8"))
    listed = harness.http.get("/v1/jobs", params={"source": job}).json()["jobs"]
    assert [one["id"] for one in listed] == [pushed]
    assert harness.job(job)["published"] is None


def test_a_push_that_fails_says_why_and_can_be_tried_again(harness: ServiceHarness) -> None:
    """The hub's error is the job's error; a retry needs the token again, because it was deleted."""
    pushed = push(harness, finished(harness, push_exit=1))
    ended = harness.until_ended(pushed)
    assert (ended["state"], ended["error"], ended["published"]) == ("failed", "the hub said no", None)
    refused(harness, f"{pushed}/retry", 422, "a push needs a hub token of its own", headers={})
    refused(harness, f"{pushed}/retry", 200, "queued")
    assert harness.until_ended(pushed)["attempts"] == 2


def test_the_token_is_nowhere_else(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is in no table, command line, environment or log, and on disk only while the push runs."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "the service's own")
    pushed = push(harness, finished(harness, push_pause=1))
    folder = harness.settings.folder(pushed)
    assert ((folder / "hub-token").stat().st_mode & 0o777, (folder / "hub-token").read_text()) == (0o600, SECRET)
    harness.until(
        pushed, lambda _: len(processes_of_job(pushed)) == 2 and b"pushing" in (folder / "log.txt").read_bytes()
    )
    for process in processes_of_job(pushed):
        assert SECRET not in str(process.environ())
        assert "the service's own" not in process.environ().values()
    for process in psutil.process_iter(["cmdline"]):
        assert SECRET not in str(process.info["cmdline"])
    assert SECRET not in harness.http.get(f"/v1/jobs/{pushed}/log").text
    harness.until_ended(pushed)
    assert not (folder / "hub-token").exists()
    with sqlite3.connect(harness.settings.database) as connection:
        assert SECRET not in "\n".join(connection.iterdump())
    assert not [path for path in harness.settings.data_dir.rglob("*") if path.is_file() and SECRET in _text(path)]


def _text(path: Path) -> str:
    return path.read_bytes().decode("latin-1")


def test_what_cannot_be_pushed(harness: ServiceHarness) -> None:
    """Refused: jobs without a finished model, pushes, deleted models, and models that are being pushed already."""
    queued = harness.submit()["id"]
    refused(harness, f"{queued}/push", 409, "is queued and has no finished model")
    refused(harness, f"{finished(harness, exit=1)}/push", 409, "is failed and has no finished model")
    refused(harness, "0" * 12 + "/push", 404, "there is no job")
    job = finished(harness, push_pause=30)
    pushed = push(harness, job)
    refused(harness, f"{job}/push", 409, f"is being pushed by job {pushed}")
    refused(harness, f"{pushed}/push", 409, "has no finished model")
    assert harness.http.delete(f"/v1/jobs/{job}").status_code == 409
    harness.http.post(f"/v1/jobs/{pushed}/cancel")
    assert harness.until_ended(pushed)["state"] == "cancelled"
    harness.service.jobs.clean(job, lambda: None)
    refused(harness, f"{job}/push", 409, "the clean-up has deleted the model")
    refused(harness, f"{pushed}/retry", 409, "the clean-up has deleted the model")
    assert harness.http.delete(f"/v1/jobs/{job}").status_code == 204
    refused(harness, f"{pushed}/retry", 409, "was deleted")
    assert not list(harness.settings.data_dir.rglob("hub-token"))


def test_a_push_that_never_started_leaves_no_token(harness: ServiceHarness) -> None:
    """The token of a push that is cancelled while it waits, or that cannot start, is deleted at once."""
    job = finished(harness)
    pushed = push(harness, job)
    assert harness.http.post(f"/v1/jobs/{pushed}/cancel").json()["state"] == "cancelled"
    assert not list(harness.settings.data_dir.rglob("hub-token"))
    pushed = push(harness, job)
    (harness.settings.folder(pushed) / "log.txt").mkdir()
    assert harness.until_ended(pushed)["state"] == "failed"
    assert not list(harness.settings.data_dir.rglob("hub-token"))


def test_a_job_whose_gate_was_not_met_is_not_changed_while_it_is_pushed(harness: ServiceHarness) -> None:
    """A job below its gate has a model, and ``when`` decides about its push; meanwhile it cannot be evaluated again."""
    job = finished(harness, exit=3, push_pause=30)
    pushed = push(harness, job, when="always")
    refused(harness, f"{job}/reevaluate?limit=100", 409, f"job {pushed} reads the files", headers={})
    harness.http.post(f"/v1/jobs/{pushed}/cancel")
    harness.until_ended(pushed)


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        ({"repo_id": "pruned"}, HEADERS, "named with its owner"),
        ({"repo_id": "org/../x"}, HEADERS, "repo_id"),
        ({}, HEADERS, "repo_id"),
        ({**REPO, "token": "x"}, HEADERS, "token"),
        ({**REPO, "private": "no"}, HEADERS, "private"),
        ({**REPO, "create_pr": True, "branch": "v2"}, HEADERS, "a pull request is opened against main"),
        ({**REPO, "commit_message": f"by {SECRET}"}, HEADERS, "holds a token"),
        (REPO, {}, "X-Hub-Token"),
        (REPO, {"X-Hub-Token": "with space"}, "X-Hub-Token"),
    ],
)
def test_wrong_pushes(
    done: tuple[ServiceHarness, str], body: dict[str, Any], headers: dict[str, str], said: str
) -> None:
    """Each mistake is named, nothing is queued, and no token is kept."""
    harness, job = done
    refused(harness, f"{job}/push", 422, said, json=body, headers=headers)
    assert harness.http.get("/v1/jobs").json()["counts"]["queued"] == 0
    assert not list(harness.settings.data_dir.rglob("hub-token"))


def test_only_owners_and_admins_push(harness: ServiceHarness) -> None:
    """A user cannot push the model of another user."""
    shared, private = harness.submit(shared=True)["id"], harness.submit(recipe(n=1))["id"]
    harness.until_ended(private)
    headers = HEADERS | {"Authorization": f"Bearer {harness.service.tokens.create('ann', 'user')}"}
    refused(harness, f"{shared}/push", 403, "belongs to local", headers=headers)
    refused(harness, f"{private}/push", 404, "there is no job", headers=headers)


def test_the_same_key_pushes_once(harness: ServiceHarness) -> None:
    """A push that is sent again with its key is the same job; another push with that key is a conflict."""
    job = finished(harness)
    headers = HEADERS | {"Idempotency-Key": "once"}
    first, second = (harness.http.post(f"/v1/jobs/{job}/push", json=REPO, headers=headers) for _ in range(2))
    assert (first.json()["id"], second.headers["Idempotent-Replay"]) == (second.json()["id"], "true")
    assert len(list(harness.settings.data_dir.rglob("hub-token"))) == 1
    refused(harness, f"{job}/push", 409, "used for another", json={"repo_id": "org/other"}, headers=headers)


def test_pushes_take_no_slot(harness: ServiceHarness) -> None:
    """Pushes take no slot, run a few at a time, and the clean-up keeps their models."""
    jobs = [finished(harness, push_pause=30, n=n) for n in range(MAX_PUSHES + 1)]
    pushes = [push(harness, job) for job in jobs]
    other = harness.submit(recipe(pause=30))["id"]
    harness.supervisor.round()
    assert [harness.job(one)["state"] for one in (*pushes, other)] == ["running"] * MAX_PUSHES + ["queued", "running"]
    assert harness.http.get("/v1/queue").json()["slots_used"] == 1
    clean_up(harness.settings.model_copy(update={"keep_days": 0.0}), harness.service.jobs)
    assert all((harness.run_folder(job) / "model").is_dir() for job in jobs)
    for one in (*pushes, other):
        harness.http.post(f"/v1/jobs/{one}/cancel")
        harness.until_ended(one)


def test_a_push_from_the_page(harness: ServiceHarness) -> None:
    """The page of a finished job has the form, and the page of a push names source and commit."""
    job = finished(harness, push_exit=1)
    page = harness.http.get(f"/jobs/{job}").text
    assert f'action="/jobs/{job}/push"' in page
    assert 'name="quantized"' not in page
    (harness.run_folder(job) / "quantized").mkdir()
    (harness.run_folder(job) / "quantized" / "config.json").write_text("{}")
    assert 'name="quantized"' in harness.http.get(f"/jobs/{job}").text
    form = {"repo_id": " org/pruned ", "hub_token": SECRET, "visibility": "public", "create_pr": "on"}
    form |= {"quantized": "on"}
    answer = harness.http.post(f"/jobs/{job}/push", data=form, follow_redirects=False)
    pushed = answer.headers["Location"].rpartition("/")[2]
    harness.until_ended(pushed)
    wanted = harness.job(pushed)["push"]
    assert (wanted["private"], wanted["create_pr"], wanted["when"]) == (False, True, "gate_passed")
    assert wanted["quantized_repo_id"] == "auto"
    page = harness.http.get(f"/jobs/{pushed}").text
    assert "the hub said no" in page
    assert f'href="/jobs/{job}"' in page
    assert 'name="hub_token"' in page
    assert f'href="/jobs/{pushed}"' in harness.http.get(f"/jobs/{job}").text
    wrong = harness.http.post(f"/jobs/{job}/push", data={"repo_id": "x"}, headers={"Accept": "text/html"})
    assert (wrong.status_code, "named with its owner" in wrong.text) == (422, True)


def test_a_real_push(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``llmprune push`` runs in its own process, with the token of this push and not with the service's."""
    verify_here(monkeypatch)
    harness = ServiceHarness(tmp_path)
    job = finished(harness)
    base, text = save_model(tmp_path / "base"), write_text(tmp_path / "text.txt")
    for left in harness.run_folder(job).rglob("*.json"):
        left.unlink()
    made = command("run", write_recipe(tmp_path / "recipe.yaml", base, text), "--output", tmp_path / "run")
    assert made.code == 0, made.err
    (tmp_path / "run").rename(harness.run_folder(job).with_name("real"))
    harness.run_folder(job).rename(harness.run_folder(job).with_name("fake"))
    harness.run_folder(job).with_name("real").rename(harness.run_folder(job))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "TheServicesOwnTokenThatNoHubKnows00")
    real = ServiceHarness(tmp_path, command=(sys.executable, "-m", "llmprune"), grace=10)
    answer = real.http.post(f"/v1/jobs/{job}/push", json=REPO, headers={"X-Hub-Token": TOKEN})
    ended = real.until(answer.json()["id"], lambda found: found["state"] in ("succeeded", "failed"), 300)
    assert ended["state"] == "succeeded", ended["error"]
    repo = hub.repo("org/pruned")
    assert (repo.private, ended["published"]["commit"]) == (True, repo.refs["main"])
    assert {"README.md", "llmprune.json", "model.safetensors"} <= set(repo.commits[repo.refs["main"]])
    assert TOKEN not in real.http.get(f"/v1/jobs/{ended['id']}/log").text
