"""Follow-ups of finished jobs: what they run and reuse, who may ask, and what they keep from being deleted."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest
from helpers.commands import command
from helpers.follow_ups import KINDS, ask, cancelled, finished, made
from helpers.service import ServiceHarness, answer_requests, recipe

from llmprune.service.supervisor.attempts import launch_of
from llmprune.service.supervisor.cleanup import remove_products


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service with fake runs."""
    return ServiceHarness(tmp_path_factory.mktemp("follow-ups"), rate=1e6, burst=10**6)


@pytest.fixture(scope="module")
def parent(harness: ServiceHarness) -> str:
    """A finished job."""
    return finished(harness)


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
        ({"kind": "size", "layers": 2}, "run", ["--scores-of=PARENT", "depth.remove=2"]),
        ({"kind": "evaluate", "tasks": ["arc_easy"], "limit": 9}, "reevaluate", ["--tasks=arc_easy", "--limit=9"]),
        ({"kind": "evaluate", "limit": 90}, "reevaluate", ["PARENT", "--limit=90", "--output=OWN"]),
        ({"kind": "bench", "dtype": "bfloat16"}, "bench", ["PARENT", "--dtype=bfloat16"]),
        (
            {"kind": "recover", "tokens": "1M"},
            "run",
            ['model.id="PARENT/model"', "recover.tokens=1000000", 'recover.against="org/model"', "depth=null"],
        ),
        (
            {"kind": "sparsify"},
            "run",
            ['model.id="PARENT/model"', 'sparsity={pattern: "2:4"}', 'evaluation.against_revision="c0ffee"'],
        ),
        ({"kind": "repeat"}, "run", ["OWN"]),
    ],
)
def test_each_kind_runs_what_reuses_most(
    harness: ServiceHarness, parent: str, work: dict[str, Any], *, begins: str, contains: list[str]
) -> None:
    """The command reads the parent's folder, and the same follow-up again gives the same command.

    What clients see is a recipe without paths of the parent, for the base's name.
    """
    commands, folder = [], str(harness.run_folder(parent).absolute())
    first = made(harness, parent, **work)
    for job in (first["id"], made(harness, first["id"], "repeat")["id"]):
        own = str(harness.run_folder(job).absolute())
        words = command_of(harness, job)
        commands.append([word.replace(own.removesuffix("/run"), "OWN") for word in words])
        assert words[0] == begins
        cancelled(harness, job)
        if job == first["id"]:
            assert {text.replace("PARENT", folder).replace("OWN", own) for text in contains} <= set(words)
    assert not any(str(harness.settings.data_dir) in text for text in (first["recipe"], *first["overrides"]))
    assert first["model"] == "org/model"
    if work["kind"] != "size":  # a size again is a run from the beginning
        assert commands[0] == commands[1]


def test_follow_ups_of_a_job_that_began_from_a_model_made_here(harness: ServiceHarness) -> None:
    """They are compared with that model, wherever the run before found it; it is kept and fetched for each."""
    base = finished(harness, config=1)
    job = harness.submit(recipe(layers=1, config=1, n=2).replace("org/model", f"job://{base}"))["id"]
    harness.until_ended(job)
    place = str(harness.run_folder(base).absolute() / "model")
    options = {
        "evaluate": f"--base={place}", "bench": f"--against={place}", "size": f'model.id="{place}"',
        "recover": f'recover.against="{place}"', "sparsify": f'evaluation.against="{place}"',
        "repeat": f'model.id="{place}"',
    }  # fmt: skip
    asked: dict[str, dict[str, Any]] = {
        "evaluate": {"limit": 90}, "size": {"layers": 2}, "recover": {"tokens": "1M"},
    }  # fmt: skip
    for kind, option in options.items():
        one = made(harness, job, kind, **asked.get(kind, {}))
        assert option in command_of(harness, one["id"]), kind
        assert one["base"] == base
        if kind == "recover":
            harness.until_ended(one["id"])
            again = made(harness, one["id"], "sparsify")
            assert options["sparsify"] in command_of(harness, again["id"])
            one = again
        cancelled(harness, one["id"])
    assert harness.http.post(f"/v1/jobs/{job}/reevaluate?limit=90").status_code == 200
    assert command_of(harness, job)[-1] == options["evaluate"]
    assert harness.until_ended(job)["state"] == "succeeded"


def test_follow_ups_of_a_job_that_cut_the_vocabulary(harness: ServiceHarness) -> None:
    """The base teaches it and is compared with it, and with what is made of it."""
    job = harness.submit(recipe(layers=1, config=1, n=3) + "vocabulary: {coverage: 0.9}\n")["id"]
    harness.until_ended(job)
    sparse = made(harness, job, "sparsify")
    assert {"vocabulary=null", 'evaluation.against="org/model"'} <= set(command_of(harness, sparse["id"]))
    harness.until_ended(sparse["id"])
    for parent in (job, sparse["id"]):
        trained = made(harness, parent, "recover", tokens="1M")
        assert {"vocabulary=null", 'recover.against="org/model"'} <= set(command_of(harness, trained["id"]))
        cancelled(harness, trained["id"])


def test_follow_ups_of_a_job_whose_base_a_recipe_cannot_name(harness: ServiceHarness) -> None:
    """Zeros are judged by the model without them, and no training is offered, to what is made of it neither."""
    own = "{id: org/model, gguf: model-Q8_0.gguf}"
    job = harness.submit(recipe(layers=1, config=1, n=4).replace("{id: org/model}", own))["id"]
    harness.until_ended(job)
    sparse = made(harness, job, "sparsify")
    assert "evaluation.against=null" in command_of(harness, sparse["id"])
    harness.until_ended(sparse["id"])
    for parent in (job, sparse["id"]):
        refused = ask(harness.http, parent, {"kind": "recover", "tokens": "1M"})
        assert (refused.status_code, "submit a recipe that prunes and recovers" in refused.text) == (422, True)
        offers = harness.http.get(f"/v1/jobs/{parent}/follow-ups").json()["offers"]
        assert {"recover"} <= {offer["kind"] for offer in offers if offer["reason"]} <= {"recover", "size"}


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


def test_files_that_are_read_cannot_be_deleted(harness: ServiceHarness) -> None:
    """Delete, retry and evaluation of the parent, and the clean-up, wait for the follow-up; then they go on."""
    parent = finished(harness, more_pause=60)
    reader = made(harness, parent, "bench")["id"]
    for at in ("queued", "running"):
        harness.until(reader, lambda found, at=at: found["state"] == at)
        refused = harness.http.delete(f"/v1/jobs/{parent}")
        assert (refused.status_code, f"job {reader} reads the files" in refused.json()["detail"]) == (409, True)
        assert harness.http.post(f"/v1/jobs/{parent}/reevaluate", params={"limit": 100}).status_code == 409
        assert remove_products(harness.settings, harness.service.jobs, job=parent) == 0
    assert (harness.run_folder(parent) / "model" / "model.safetensors").is_file()
    harness.http.post(f"/v1/jobs/{reader}/cancel")
    assert harness.until_ended(reader)["state"] == "cancelled"
    assert remove_products(harness.settings, harness.service.jobs, job=parent) > 0
    assert not list(harness.settings.trash.iterdir())
    assert "has deleted the model" in ask(harness.http, parent, {"kind": "bench"}).json()["detail"]
    assert "has deleted the model" in harness.http.post(f"/v1/jobs/{reader}/retry").json()["detail"]
    smaller = made(harness, parent, "size", layers=2)["id"]  # the scores are kept
    cancelled(harness, smaller)
    assert harness.http.delete(f"/v1/jobs/{parent}").status_code == 204
    assert "was deleted" in harness.http.post(f"/v1/jobs/{reader}/retry").json()["detail"]
    assert harness.job(smaller)["made_from"] == parent


def test_a_key_makes_one_follow_up(harness: ServiceHarness, parent: str) -> None:
    """The same key and content give the same job, another content is refused."""
    key = {"Idempotency-Key": "once"}
    path, body = f"/v1/jobs/{parent}/follow-ups", {"work": {"kind": "bench"}}
    first, second = (harness.http.post(path, json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["Idempotent-Replay"] == "true"
    other = {"work": {"kind": "bench", "repeats": 2}}
    assert harness.http.post(path, json=other, headers=key).status_code == 409
    cancelled(harness, first.json()["id"])


def test_unfinished_and_damaged_parents(harness: ServiceHarness) -> None:
    """A job that waits or has failed has no follow-ups; one without its report says so; a damaged row fails its job."""
    waiting = harness.submit(recipe(exit=1))["id"]
    assert "is queued" in ask(harness.http, waiting, {"kind": "bench"}).json()["detail"]
    harness.until_ended(waiting)
    assert "is failed" in ask(harness.http, waiting, {"kind": "bench"}).json()["detail"]
    cancelled(harness, made(harness, waiting, "repeat")["id"])
    lost = finished(harness)
    (harness.run_folder(lost) / "report.json").unlink()
    assert "cannot be read" in ask(harness.http, lost, {"kind": "recover", "tokens": 10}).json()["detail"]
    broken = made(harness, lost, "bench")["id"]
    with harness.service.database.write() as connection:
        connection.execute("UPDATE jobs SET work = '{' WHERE id = ?", (broken,))
    assert "damaged (work)" in harness.until_ended(broken)["error"]


def test_a_follow_up_continues_after_a_restart(harness: ServiceHarness) -> None:
    """A supervisor that ends queues it again, and the next one starts the same command."""
    parent = finished(harness, more_pause=1.5)
    job = made(harness, parent, "evaluate", tasks=["arc_easy"])["id"]
    harness.until(job, lambda found: found["state"] == "running")
    before = command_of(harness, job)
    harness.supervisor.stop()
    assert harness.job(job)["state"] == "queued"
    assert command_of(harness, job) == before
    ended = harness.until_ended(job)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 2)
    assert ended["figures"]


def test_commands(harness: ServiceHarness, parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is a command whose options are its settings; mistakes exit with 2 and the service's words."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = harness.http.request(
            request.method,
            request.url.raw_path.decode(),
            content=request.content,
            headers={"Content-Type": "application/json"},
        )
        return httpx.Response(found.status_code, content=found.content, headers={"Content-Type": "application/json"})

    answer_requests(monkeypatch, answer)
    for words, work in (
        (["bench", "--batch-sizes", "2, 4", "--repeats", "3"], {"batch_sizes": [2, 4], "repeats": 3, "new_tokens": 32}),
        (["evaluate", "--tasks", "piqa", "--limit", "7"], {"tasks": ["piqa"], "limit": 7}),
        (["recover", "--tokens", "2M", "--name", "more"], {"tokens": 2_000_000}),
        (["size", "--layers", "2"], {"layers": 2}),
    ):
        done = command("follow-up", words[0], parent, *words[1:])
        assert done.code == 0, done.err
        found = harness.job(done.out.strip())
        assert work.items() <= found["work"].items()
        cancelled(harness, found["id"])
    listed = command("follow-up", "list", parent)
    assert (listed.code, "bench      possible" in listed.out) == (0, True), listed.out
    assert "bench" in command("follow-up", "list", parent, "--json").out
    for words, said in (
        (["size", parent], "give keep"),
        (["bench", "x"], "there is no job 'x'"),
        (["bench", parent, "--contexts", ","], "--contexts names nothing"),
    ):
        wrong = command("follow-up", *words)
        assert (wrong.code, said in wrong.err) == (2, True), wrong.err
