"""Models to choose from on the page for a new job: of this machine, made by finished jobs, on the hub."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from helpers.searching import searched
from helpers.service import RECIPE, ServiceHarness, answer_requests, recipe, settings_in

from llmprune.results.run_folder.products import SEARCH
from llmprune.service.web.new_job.first_recipe import DEMO_MODEL
from llmprune.service.web.new_job.hub_search import OFFLINE, TOO_MANY, UNREACHABLE, HubSearch
from llmprune.service.web.new_job.local_models import LocalModels

HTML = {"Accept": "text/html"}
SHAPED = "model: {id: org/model}\ncalibration: {dataset: org/text}\nbudget: {parameters: 0.75}\n"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with the tokens of two users, a folder of models, and a finished job of ann's with a model."""
    root = tmp_path_factory.mktemp("new-job")
    for name in ("llama", "deep/er/qwen", ".hidden", "data/jobs/x"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").touch()
        (root / name / "model.safetensors").touch()
    (root / "llama" / "extra-Q4.gguf").touch()
    (root / "text.txt").touch()
    return ServiceHarness(root, allow_roots=(root,))


@pytest.fixture(scope="module")
def users(harness: ServiceHarness) -> dict[str, dict[str, str]]:
    """Headers with the tokens of two users and an admin."""
    roles = {"ann": "user", "bob": "user", "root": "admin"}
    return {
        name: {"Authorization": f"Bearer {harness.service.tokens.create(name, role)}", "Accept": "text/html"}
        for name, role in roles.items()
    }


@pytest.fixture(scope="module")
def made(harness: ServiceHarness, users: dict[str, dict[str, str]]) -> str:
    """A finished job of ann's whose model another may start from."""
    return finished(harness, SHAPED, users["ann"], name="ann's small one")


def finished(harness: ServiceHarness, text: str, headers: dict[str, str], **params: Any) -> str:
    """Return a job that has ended with a model, without having run."""
    job: str = harness.submit(text, headers, **params)["id"]
    folder = harness.run_folder(job)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    figures = json.dumps({"parameters": [100, 75], "bytes": [400, 300], "layers": [4, 3]})
    with harness.service.database.write() as connection:
        change = "UPDATE jobs SET state = 'succeeded', figures = ?, finished = ? WHERE id = ?"
        connection.execute(change, (figures, time.time() + 999, job))
    return job


def starting_from(job: str) -> str:
    """Return a recipe for the model of a job."""
    return RECIPE.replace("org/model", f"job://{job}")


def problems(harness: ServiceHarness, text: str, headers: dict[str, str]) -> list[str]:
    """Return the problems of a recipe over HTTP."""
    answer = harness.http.post(
        "/v1/recipes/validate", content=text, headers=headers | {"Content-Type": "application/yaml"}
    )
    found: list[str] = answer.json()["problems"]
    return found


def test_a_job_starts_from_the_model_of_a_job_that_its_owner_may_read(
    harness: ServiceHarness, users: dict[str, dict[str, str]], made: str
) -> None:
    """The owner's and an admin's recipes may name it; to others it is as if there were no such job."""
    for name in ("ann", "root"):
        assert problems(harness, starting_from(made), users[name]) == []
    (refused,) = problems(harness, starting_from(made), users["bob"])
    (missing,) = problems(harness, starting_from("0" * 12), users["bob"])
    assert refused.replace(made, "0" * 12) == missing
    assert "there is no job of this id with a finished model" in refused
    job = harness.submit(starting_from(made), users["ann"])
    folder = harness.run_folder(made).absolute() / "model"
    assert harness.service.jobs.get(job["id"]).overrides == (f'model.id="{folder}"',)
    assert (job["model"], job["name"]) == (f"job://{made}", "ann's small one −1 layer")
    assert str(harness.settings.data_dir) not in json.dumps(job)
    harness.http.post(f"/v1/jobs/{job['id']}/cancel", headers=users["ann"])


@pytest.mark.parametrize(
    "broken",
    [
        "job://{job}/../{job}",
        "job://{job}/model",
        "job://",
        "job://../{job}",
        "JOB://{job}",
        "job:/{job}",
        "{folder}",
        "data/jobs/{job}/run/model",
    ],
)
def test_nothing_else_of_a_job_can_be_named(
    harness: ServiceHarness, users: dict[str, dict[str, str]], made: str, broken: str
) -> None:
    """Only the id of a job stands for its model; no path leads into the service's folder, not even the owner's."""
    named = broken.format(job=made, folder=harness.run_folder(made) / "model")
    assert any("model.id" in one for one in problems(harness, RECIPE.replace("org/model", named), users["ann"]))


@pytest.mark.parametrize("place", ["calibration: {dataset: %s}", "evaluation: {against: %s}", "model: {base: %s}"])
def test_no_other_key_takes_a_jobs_model(
    harness: ServiceHarness, users: dict[str, dict[str, str]], made: str, place: str
) -> None:
    """Text, reference and base of an adapter are no jobs."""
    data = yaml.safe_load(RECIPE)
    for section, keys in yaml.safe_load(place % f"job://{made}").items():
        data[section] = data.get(section, {}) | keys
    assert any("not allowed here" in one for one in problems(harness, yaml.safe_dump(data), users["ann"]))


def test_a_model_is_kept_while_a_job_starts_from_it(harness: ServiceHarness, users: dict[str, dict[str, str]]) -> None:
    """Neither deletion nor clean-up takes the model of a base; once the other job has ended, both may."""
    from llmprune.service.supervisor.cleanup import clean_up

    base = finished(harness, recipe(n=1), users["ann"])
    job = harness.submit(starting_from(base), users["ann"])["id"]
    refused = harness.http.delete(f"/v1/jobs/{base}", headers=users["ann"])
    assert (refused.status_code, f"job {job} reads the files" in refused.text) == (409, True)
    settings = harness.settings.model_copy(update={"keep_days": 0.0})
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET finished = ? WHERE id = ?", (time.time() - 9, base))
    clean_up(settings, harness.service.jobs)
    assert (harness.run_folder(base) / "model").is_dir()
    harness.http.post(f"/v1/jobs/{job}/cancel", headers=users["ann"])
    clean_up(settings, harness.service.jobs)
    assert not (harness.run_folder(base) / "model").is_dir()
    assert problems(harness, starting_from(base), users["ann"]) != []
    again = harness.http.post(f"/v1/jobs/{job}/retry", headers=users["ann"])
    assert (again.status_code, f"has deleted the model of job {base}" in again.text) == (409, True)
    assert harness.http.delete(f"/v1/jobs/{base}", headers=users["ann"]).status_code == 204


def choices(harness: ServiceHarness, headers: dict[str, str], find: str = "") -> list[str]:
    """Return the models that the page offers."""
    text = harness.http.get("/submit/models", params={"find": find}, headers=headers).text
    return re.findall(r'data-model="([^"]+)"', text)


def test_models_of_this_machine_and_of_jobs_can_be_chosen(
    harness: ServiceHarness, users: dict[str, dict[str, str]], made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demo, allowed folders but hidden ones and the service's own, and jobs that one may read; words narrow them."""
    monkeypatch.setattr("llmprune.service.web.new_job.hub_search._is_offline", lambda: True)
    local = [DEMO_MODEL, "deep/er/qwen", "llama", "llama/extra-Q4.gguf"]
    assert choices(harness, users["bob"]) == local
    assert set(choices(harness, users["ann"])) == {*local, f"job://{made}"}
    assert choices(harness, users["ann"], "SMALL one") == [f"job://{made}"]
    assert choices(harness, users["ann"], "qwen") == ["deep/er/qwen"]
    told = harness.http.get("/submit/models", params={"find": "qwen"}, headers=users["ann"]).text
    assert OFFLINE in told
    for name in local[1:]:
        assert problems(harness, RECIPE.replace("org/model", name), users["bob"]) == []


def test_a_walk_through_a_large_folder_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of very many files is left after some thousand entries, and a link out of it is not followed."""
    monkeypatch.setattr("llmprune.service.web.new_job.local_models._MAX_ENTRIES", 5)
    for number in range(9):
        place = tmp_path / "root" / f"m{number}"
        place.mkdir(parents=True)
        (place / "config.json").touch()
        (place / "model.safetensors").touch()
    (tmp_path / "root" / "link").symlink_to("/etc")
    assert len(LocalModels(settings_in(tmp_path, allow_roots=(tmp_path / "root",))).names()) < 9


FOUND = [
    {"id": "org/small", "gated": False, "safetensors": {"parameters": {"F32": 600}, "total": 600_000_000}},
    {"id": "org/gated", "gated": "manual"},
]


def test_the_hub_is_searched_once_for_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are cached; the operator's token is sent only where it is lent."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json=FOUND, request=request)

    answer_requests(monkeypatch, answer)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    search = HubSearch(lend_token=False)
    found = [search.find(text, caller="ann") for text in ("Small  Model", "small model ")]
    assert found[0] == found[1]
    assert [(one.id, one.parameters, one.gated) for one in found[0].models] == [
        ("org/small", 600_000_000, False),
        ("org/gated", None, True),
    ]
    assert len(asked) == 1
    assert dict(asked[0].url.params)["search"] == "small model"
    assert "authorization" not in asked[0].headers
    HubSearch(lend_token=True).find("small model", caller="ann")
    assert asked[1].headers["authorization"] == "Bearer hf_secret"


def test_a_hub_that_does_not_answer_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page explains it; nothing is asked again until some time has passed."""
    asked, now = [], [0.0]

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise httpx.ConnectError("no route", request=request)

    answer_requests(monkeypatch, answer)
    search = HubSearch(lend_token=False, clock=lambda: now[0])
    for text in ("one", "two", "one"):
        assert search.find(text, caller="ann").problem == UNREACHABLE
    assert len(asked) == 1
    now[0] = 60.0
    search.find("two", caller="ann")
    assert len(asked) == 2


def test_a_caller_searches_at_a_limited_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a burst of different words a caller waits, and another does not."""
    answer_requests(monkeypatch, lambda request: httpx.Response(200, json=[], request=request))
    search = HubSearch(lend_token=False)
    told = [search.find(f"word {number}", caller="ann").problem for number in range(30)]
    assert (told[0], told[-1]) == (None, TOO_MANY)
    assert search.find("another", caller="bob").problem is None


def test_a_finished_search_of_the_same_model_shows_its_sizes(
    harness: ServiceHarness, users: dict[str, dict[str, str]], made: str
) -> None:
    """Sizes of the frontier lead to their recipes; other models and other people's jobs have none."""
    (harness.run_folder(made) / SEARCH).write_text(searched().model_dump_json())

    def shown(name: str, model: str) -> str:
        return harness.http.get("/submit/frontier", params={"model": model}, headers=users[name]).text

    known = shown("ann", "org/model")
    links = re.findall(r'href="(/submit\?[^"]+)"', known)
    assert 1 < len(links) <= 6
    editor = harness.http.get(links[0].replace("&amp;", "&"), headers=users["ann"])
    assert (editor.status_code, "budget" in editor.text.split("<textarea")[1].split("</textarea>")[0]) == (200, False)
    assert [shown(*asked).strip() for asked in (("bob", "org/model"), ("ann", "org/mod"), ("ann", ""))] == [""] * 3
