"""Caches of the hub: what one user or the operator pulled with a token, no other job has."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub.server import Hub
from helpers.hub.state import TOKEN
from helpers.service import RECIPE, ServiceHarness, recipe

from llmprune.common.errors import RecipeError
from llmprune.service.recipe_policy.policy import admit
from llmprune.service.settings import Settings
from llmprune.service.supervisor.cleanup import clean_up, over_quota

PULL = """
import os, sys
from huggingface_hub import snapshot_download
assert os.path.isfile(snapshot_download("org/secret", revision=sys.argv[1]) + "/config.json")
"""


@pytest.fixture
def private(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A command that pulls a private repository by its commit, as the operator did with a token: it is in the cache."""
    from huggingface_hub import snapshot_download

    repo = hub.add_repo("org/secret", {"config.json": b'{"model_type": "llama"}'}, private=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "operator"))
    snapshot_download("org/secret", revision=repo.refs["main"], cache_dir=tmp_path / "operator" / "hub")
    monkeypatch.setenv("HF_TOKEN", "")
    return (sys.executable, "-c", PULL, repo.refs["main"])


def test_a_private_repository_in_the_operators_cache_cannot_be_had_by_its_commit(
    private: tuple[str, ...], tmp_path: Path
) -> None:
    """The hub's client asks nobody for a commit that it has; a job has another cache, and a lent one is the control."""
    harness = ServiceHarness(tmp_path, command=private)
    job = harness.submit()["id"]
    assert harness.until_ended(job)["state"] == "failed"
    assert "org/secret" in harness.http.get(f"/v1/jobs/{job}/log").text
    lent = ServiceHarness(tmp_path / "lent", command=private, lend_hub_token=True)
    assert lent.until_ended(lent.submit()["id"])["state"] == "succeeded"


def test_what_one_user_pulled_with_a_token_nobody_else_has(private: tuple[str, ...], tmp_path: Path) -> None:
    """The job with a token pulls the repository; its cache is deleted with it, and the next job finds nothing."""
    harness = ServiceHarness(tmp_path, command=private, slots=2)
    first = harness.submit(headers={"X-Hub-Token": TOKEN})["id"]
    assert harness.until_ended(first)["state"] == "succeeded", harness.http.get(f"/v1/jobs/{first}/log").text
    assert not (harness.settings.folder(first) / "hub-home").exists()
    assert harness.until_ended(harness.submit(recipe(n=1))["id"])["state"] == "failed"
    assert not list(harness.settings.data_dir.rglob("models--org--secret/snapshots/*"))


def pulled(harness: ServiceHarness, job: str) -> Path:
    """A file that lies in a job's own cache."""
    place = harness.settings.folder(job) / "hub-home" / "hub" / "models--org--secret" / "x"
    place.parent.mkdir(parents=True)
    place.write_text("private")
    return harness.settings.folder(job) / "hub-home"


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[tuple[ServiceHarness, str, Path]]:
    """A running job with a token and something in its cache."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit(recipe(pause=0.4, layers=3, exit=1), {"X-Hub-Token": "hf_x"})["id"]
    harness.until(job, lambda found: found["total"] is not None)
    yield harness, job, pulled(harness, job)
    harness.until_ended(job)


def test_a_jobs_cache_goes_when_it_fails_and_a_retry_has_none(cached: tuple[ServiceHarness, str, Path]) -> None:
    """It lives as long as the token; without a new one the retry uses what anybody may pull."""
    harness, job, home = cached
    assert harness.until_ended(job)["state"] == "failed"
    assert not home.exists()
    harness.http.post(f"/v1/jobs/{job}/retry")
    harness.until_ended(job)
    seen = json.loads((harness.run_folder(job) / "arguments.json").read_text())["environment"]
    assert (seen["HF_TOKEN_PATH"], home.exists()) == (None, False)


def test_a_jobs_cache_goes_when_it_is_cancelled(cached: tuple[ServiceHarness, str, Path]) -> None:
    """Also where the service was stopped meanwhile: then token and cache wait with the job, until it is cancelled."""
    harness, job, home = cached
    harness.supervisor.stop()
    assert (harness.job(job)["state"], home.exists()) == ("queued", True)
    assert harness.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert [path.name for path in (home, home.with_name("hub-token")) if path.exists()] == []


def test_a_jobs_cache_goes_when_it_cannot_start(tmp_path: Path) -> None:
    """A job that fails before it runs leaves neither token nor cache."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit(headers={"X-Hub-Token": "hf_x"})["id"]
    home = pulled(harness, job)
    (harness.settings.folder(job) / "log.txt").mkdir()
    assert harness.until_ended(job)["state"] == "failed"
    assert [path.name for path in (home, home.with_name("hub-token")) if path.exists()] == []


def test_a_second_retry_does_not_take_the_token_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two retries at once one is refused; the job of the other keeps its token and its cache."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit(recipe(exit=1))["id"]
    harness.until_ended(job)
    seen = harness.service.jobs.get(job)
    headers = {"X-Hub-Token": "hf_x"}
    assert harness.http.post(f"/v1/jobs/{job}/retry", headers=headers).status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(
            "llmprune.service.api.dependencies.Service.own_job", lambda *_: seen
        )  # as read an instant earlier
        assert harness.http.post(f"/v1/jobs/{job}/retry", headers=headers).status_code == 409
    assert (harness.settings.folder(job) / "hub-token").is_file()


def test_the_shared_cache_gives_way_and_takes_no_model(tmp_path: Path) -> None:
    """Above the quota by what was pulled: models are kept, no job starts, and the cache is deleted when none runs."""
    harness = ServiceHarness(tmp_path)
    done = harness.submit()["id"]
    harness.until_ended(done)
    place = harness.settings.hub_home / "hub" / "models--org--large" / "blob"
    place.parent.mkdir(parents=True)
    place.write_bytes(os.urandom(3_000_000))
    tight = harness.settings.model_copy(update={"disk_quota": 2_000_000})
    running = harness.submit(recipe(pause=30))["id"]
    harness.supervisor.round()
    clean_up(tight, harness.service.jobs)
    assert (place.exists(), over_quota(tight), (harness.run_folder(done) / "model").is_dir()) == (True, True, True)
    harness.http.post(f"/v1/jobs/{running}/cancel")
    harness.until_ended(running)
    clean_up(tight, harness.service.jobs)
    assert (place.exists(), over_quota(tight), (harness.run_folder(done) / "model").is_dir()) == (False, False, True)


def test_a_root_around_the_data_folder_opens_no_job(tmp_path: Path) -> None:
    """A recipe cannot name another user's model by its path, also where --allow-root holds the service's folder."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit()["id"]
    harness.until_ended(job)
    settings = Settings(data_dir=harness.settings.data_dir, allow_roots=(tmp_path,))
    (tmp_path / "link").symlink_to(harness.run_folder(job))
    for name in (str(harness.run_folder(job) / "model"), f"data/jobs/{job}/run/model", "link/model"):
        with pytest.raises(RecipeError, match="the service's own folder holds other people's jobs"):
            admit(RECIPE.replace("org/model", name), (), settings=settings)
    shutil.copytree(harness.run_folder(job) / "model", tmp_path / "model")
    admit(RECIPE.replace("org/model", "./model"), (), settings=settings)
