"""Follow-ups of finished jobs: what they run and reuse, who may ask, and what they keep from being deleted."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from helpers.service import BASE, ServiceHarness, recipe

from llmprune.service.jobs.store_reads import Conflict
from llmprune.service.jobs.tokens import Tokens
from llmprune.service.supervisor.attempts import launch_of
from llmprune.service.supervisor.cleanup import clean_up, remove_products, used_bytes

KINDS = ["evaluate", "bench", "size", "recover", "sparsify", "repeat"]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path_factory.mktemp("follow-ups"))


@pytest.fixture(scope="module")
def parent(harness: ServiceHarness) -> str:
    """A finished job."""
    return finished(harness)


def finished(harness: ServiceHarness, **behaviour: object) -> str:
    """Run a job to its end and return its id."""
    job: str = harness.submit(recipe(layers=1, **behaviour))["id"]
    assert harness.until_ended(job)["figures"]
    return job


def ask(client: Any, job: str, work: dict[str, Any], **settings: Any) -> Any:
    """Ask for a follow-up and return the answer."""
    return client.post(f"/v1/jobs/{job}/follow-ups", json={"work": work} | settings)


def made(harness: ServiceHarness, job: str, kind: str, **work: Any) -> dict[str, Any]:
    """Ask for a follow-up and return its job."""
    answer = ask(harness.http, job, {"kind": kind} | work)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def command_of(harness: ServiceHarness, job: str) -> list[str]:
    """Return the command line of a job's next attempt."""
    found = harness.service.jobs.get(job)
    assert found is not None
    return list(launch_of(found, harness.settings).arguments)


def test_a_follow_up_says_what_it_was_made_from(harness: ServiceHarness, parent: str) -> None:
    """Job, list, filter and offers name both ends; the parent's files are where they were."""
    bench = made(harness, parent, "bench", batch_sizes=[1], contexts=[4, 16])
    assert (bench["made_from"], bench["reads"], bench["work"]["kind"]) == (parent, parent, "bench")
    assert bench["name"].startswith("Bench of ")
    ended = harness.until_ended(bench["id"])
    assert (ended["state"], ended["figures"]) == ("succeeded", None)
    listed = harness.http.get("/v1/jobs", params={"made_from": parent}).json()["jobs"]
    assert bench["id"] in [one["id"] for one in listed]
    found = harness.http.get(f"/v1/jobs/{parent}/follow-ups").json()
    assert [offer["kind"] for offer in found["offers"]] == KINDS
    assert all(offer["reason"] is None for offer in found["offers"]), found["offers"]
    assert bench["id"] in [one["id"] for one in found["jobs"]]
    assert json.loads((harness.run_folder(bench["id"]) / "bench.json").read_text()) == "no figures"
    of_bench = harness.http.get(f"/v1/jobs/{bench['id']}/follow-ups").json()
    assert [offer["kind"] for offer in of_bench["offers"] if offer["reason"] is None] == ["repeat"]


@pytest.mark.parametrize(
    ("work", "begins", "contains"),
    [
        ({"kind": "size", "layers": 2}, "run", ["--scores-of={parent}", "depth.remove=2"]),
        ({"kind": "evaluate", "tasks": ["arc_easy"], "limit": 9}, "reevaluate", ["--tasks=arc_easy", "--limit=9"]),
        ({"kind": "evaluate", "limit": 90}, "reevaluate", ["{parent}", "--limit=90", "--output={own}"]),
        ({"kind": "bench", "dtype": "bfloat16"}, "bench", ["{parent}", "--dtype=bfloat16"]),
        (
            {"kind": "recover", "tokens": "1M"},
            "run",
            ['model.id="{parent}/model"', "recover.tokens=1000000", 'recover.against="org/model"', "depth=null"],
        ),
        (
            {"kind": "sparsify"},
            "run",
            ['model.id="{parent}/model"', 'sparsity={pattern: "2:4"}', 'evaluation.against_revision="c0ffee"'],
        ),
        ({"kind": "repeat"}, "run", ["{own}"]),
    ],
)
def test_each_kind_runs_what_reuses_most(
    harness: ServiceHarness, parent: str, work: dict[str, Any], *, begins: str, contains: list[str]
) -> None:
    """The command reads the parent's folder, and the same follow-up again gives the same command."""
    folder = harness.run_folder(parent).absolute()
    commands = []
    first = made(harness, parent, **work)["id"]
    harness.until_ended(first)
    for job in (first, made(harness, first, "repeat")["id"]):
        own = harness.run_folder(job).absolute()
        words = command_of(harness, job)
        commands.append([word.replace(str(own.parent), "OWN") for word in words])
        assert words[0] == begins
        if job == first:
            assert {text.format(parent=folder, own=own) for text in contains} <= {*words, *_values(words)}
        assert harness.until_ended(job)["state"] == "succeeded"
    if work["kind"] != "size":  # a size again is a run from the beginning
        assert commands[0] == commands[1]


def _values(words: list[str]) -> set[str]:
    return {word.partition("=")[2] for word in words if word.startswith("--output=")} | {
        word for word in words if word.startswith("--output=")
    }


def test_stored_recipe_has_no_path_of_the_parent(harness: ServiceHarness, parent: str) -> None:
    """What clients see and what is admitted again is a recipe like any other."""
    job = made(harness, parent, "sparsify")
    assert not any(str(harness.settings.data_dir) in text for text in (job["recipe"], *job["overrides"]))
    assert harness.service.jobs.get(job["id"]).model == "org/model"
    harness.until_ended(job["id"])


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ({"kind": "size", "keep": 0.5}, "layers, mlp or both"),
        ({"kind": "size", "mlp": 0.5}, "has not scored neurons"),
        ({"kind": "size"}, "give keep, or layers, mlp or both"),
        ({"kind": "evaluate", "tasks": ["/etc/passwd"]}, "evaluation.tasks"),
        ({"kind": "evaluate", "limit": 10}, "give a larger number"),
        ({"kind": "recover", "tokens": 5, "hours": 1}, "exactly one of tokens and hours"),
        ({"kind": "sparsify", "pattern": "4:2"}, "4:2"),
        ({"kind": "bench", "contexts": [0]}, "contexts"),
        ({"kind": "fly"}, "kind"),
    ],
)
def test_mistakes_are_refused_before_a_job_is_made(
    harness: ServiceHarness, parent: str, work: dict[str, Any], *, said: str
) -> None:
    """Work that the job cannot have, or that the policy forbids, is refused with the reason."""
    before = len(harness.http.get("/v1/jobs", params={"limit": 500}).json()["jobs"])
    answer = ask(harness.http, parent, work)
    assert (answer.status_code, said in answer.text) == (422, True), answer.text
    assert len(harness.http.get("/v1/jobs", params={"limit": 500}).json()["jobs"]) == before


def test_a_budget_is_changed_by_its_fraction(harness: ServiceHarness) -> None:
    """A job with a budget for the parameters takes ``keep``, and no layers; another budget takes neither."""
    text = recipe(layers=1).replace("depth: {remove: 1}", "budget: {parameters: 0.8}")
    job = harness.submit(text)["id"]
    harness.until_ended(job)
    smaller = made(harness, job, "size", keep=0.6)
    assert "budget.parameters=0.6" in smaller["overrides"]
    assert "60%" in smaller["name"]
    assert "give that alone" in ask(harness.http, job, {"kind": "size", "layers": 1}).text
    weights = harness.submit(text.replace("parameters", "weights"))["id"]
    harness.until_ended(weights)
    offers = {one["kind"]: one["reason"] for one in harness.http.get(f"/v1/jobs/{weights}/follow-ups").json()["offers"]}
    assert "limits weights" in offers["size"]
    harness.until_ended(smaller["id"])


def test_files_that_are_read_cannot_be_deleted(harness: ServiceHarness) -> None:
    """Delete, retry and evaluation of the parent, and the clean-up, wait for the follow-up; then they go on."""
    parent = finished(harness, more_pause=60)
    reader = made(harness, parent, "bench")["id"]
    for at in ("queued", "running"):
        harness.until(reader, lambda found, at=at: found["state"] == at)
        refused = harness.http.delete(f"/v1/jobs/{parent}")
        assert (refused.status_code, f"job {reader} reads the files" in refused.json()["detail"]) == (409, True)
        assert harness.http.post(f"/v1/jobs/{parent}/reevaluate", params={"limit": 100}).status_code == 409
        found = harness.service.jobs.get(parent)
        assert remove_products(harness.settings, harness.service.jobs, job=found) == 0
    assert (harness.run_folder(parent) / "model" / "model.safetensors").is_file()
    harness.http.post(f"/v1/jobs/{reader}/cancel")
    assert harness.until_ended(reader)["state"] == "cancelled"
    assert remove_products(harness.settings, harness.service.jobs, job=harness.service.jobs.get(parent)) > 0
    assert not list(harness.settings.trash.iterdir())
    assert "has deleted the model" in ask(harness.http, parent, {"kind": "bench"}).json()["detail"]
    assert "has deleted the model" in harness.http.post(f"/v1/jobs/{reader}/retry").json()["detail"]
    smaller = made(harness, parent, "size", layers=2)["id"]  # the scores are kept
    harness.until_ended(smaller)
    assert harness.http.delete(f"/v1/jobs/{parent}").status_code == 204
    assert "was deleted" in harness.http.post(f"/v1/jobs/{reader}/retry").json()["detail"]
    assert harness.job(smaller)["made_from"] == parent


def test_a_clean_up_that_was_killed_is_completed(tmp_path: Path) -> None:
    """A model in the trash is deleted and its job marked; a model that two jobs share counts once."""
    harness = ServiceHarness(tmp_path, disk_quota=10**12)
    parent = finished(harness)
    shared = made(harness, parent, "evaluate", tasks=["arc_easy"])["id"]
    harness.until_ended(shared)
    model = harness.run_folder(parent) / "model"
    both = used_bytes(harness.settings.data_dir / "jobs")
    harness.settings.trash.mkdir()
    (harness.settings.trash / parent).mkdir()
    model.rename(harness.settings.trash / parent / "model")
    clean_up(harness.settings, harness.service.jobs)
    assert harness.job(parent)["cleaned"]
    assert not list(harness.settings.trash.iterdir())
    assert (harness.run_folder(shared) / "model" / "model.safetensors").is_file()
    assert used_bytes(harness.settings.data_dir / "jobs") == both


def test_only_readers_may_ask_and_own_what_they_ask_for(tmp_path: Path) -> None:
    """A private job does not exist for others; of a shared one they make follow-ups of their own."""
    harness = ServiceHarness(tmp_path)
    tokens = Tokens(harness.service.database)
    ann, bob = (
        TestClient(harness.app, base_url=BASE, headers={"Authorization": f"Bearer {tokens.create(name, 'user')}"})
        for name in ("ann", "bob")
    )
    jobs = {}
    for shared in (True, False):
        answer = ann.post(
            "/v1/jobs",
            content=recipe(layers=1),
            params={"shared": shared},
            headers={"Content-Type": "application/yaml"},
        )
        jobs[shared] = answer.json()["id"]
        harness.supervisor.round()
    while any(ann.get(f"/v1/jobs/{job}").json()["state"] != "succeeded" for job in jobs.values()):
        harness.supervisor.round()
        time.sleep(0.02)
    for client, status in ((ann, 201), (bob, 404)):
        assert ask(client, jobs[False], {"kind": "bench"}).status_code == status
        assert client.get(f"/v1/jobs/{jobs[False]}/follow-ups").status_code == (200 if status == 201 else 404)
    own = ask(bob, jobs[True], {"kind": "bench"}).json()
    assert own["owner"] == "bob"
    assert ann.get(f"/v1/jobs/{own['id']}").status_code == 404
    assert own["id"] not in [one["id"] for one in ann.get(f"/v1/jobs/{jobs[True]}/follow-ups").json()["jobs"]]
    refused = ann.delete(f"/v1/jobs/{jobs[True]}").json()["detail"]
    assert "a job of another user reads" in refused
    assert own["id"] not in refused
    assert "only admins" in ask(bob, jobs[True], {"kind": "bench"}, priority=5).text


def test_a_key_makes_one_follow_up(harness: ServiceHarness, parent: str) -> None:
    """The same key and content give the same job, another content is refused."""
    key = {"Idempotency-Key": "once"}
    path, body = f"/v1/jobs/{parent}/follow-ups", {"work": {"kind": "bench"}}
    first, second = (harness.http.post(path, json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["Idempotent-Replay"] == "true"
    other = {"work": {"kind": "bench", "repeats": 2}}
    assert harness.http.post(path, json=other, headers=key).status_code == 409
    harness.until_ended(first.json()["id"])


def test_unfinished_and_damaged_parents(harness: ServiceHarness) -> None:
    """A job that waits or has failed has no follow-ups; one without its report says so; a damaged row fails its job."""
    waiting = harness.submit(recipe(exit=1))["id"]
    assert "is queued" in ask(harness.http, waiting, {"kind": "bench"}).json()["detail"]
    harness.until_ended(waiting)
    assert "is failed" in ask(harness.http, waiting, {"kind": "bench"}).json()["detail"]
    harness.until_ended(made(harness, waiting, "repeat")["id"])
    lost = finished(harness)
    (harness.run_folder(lost) / "report.json").unlink()
    assert "cannot be read" in ask(harness.http, lost, {"kind": "recover", "tokens": 10}).json()["detail"]
    broken = made(harness, lost, "bench")["id"]
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET work = '{' WHERE id = ?", (broken,))
    assert "damaged (work)" in harness.until_ended(broken)["error"]
    with pytest.raises(Conflict):
        harness.service.jobs.delete(waiting) or harness.service.jobs.retry(lost)
    shutil.rmtree(harness.settings.folder(lost))


def test_a_follow_up_continues_after_a_restart(harness: ServiceHarness) -> None:
    """A supervisor that ends queues it again, and the next one starts the same command."""
    parent = finished(harness, more_pause=0.3)
    job = made(harness, parent, "evaluate", tasks=["arc_easy"])["id"]
    harness.until(job, lambda found: found["state"] == "running")
    before = command_of(harness, job)
    harness.supervisor.stop()
    assert harness.job(job)["state"] == "queued"
    assert command_of(harness, job) == before
    ended = harness.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 2)
    assert ended["figures"]
