"""The Python client, blocking and asynchronous, on a service in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from helpers.reports import sample_report
from helpers.service import BASE, RECIPE, ServiceHarness, recipe
from helpers.service_answers import talking_to

from llmprune import AsyncClient, Recipe
from llmprune.common.errors import (
    AccessDenied,
    JobFailed,
    NotFound,
    OutputError,
    RecipeError,
    ServiceBusy,
    ServiceError,
    StateConflict,
)
from llmprune.service.client.sync import client as sync_client
from llmprune.service.client.sync.client import Client


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service for the tests of this file."""
    return ServiceHarness(tmp_path_factory.mktemp("python"), rate=1e6, burst=10**6)


@pytest.fixture(scope="module")
def client(harness: ServiceHarness) -> Iterator[Client]:
    """A client of it that waits shortly."""
    with harness.client(pause=lambda _: time.sleep(0.05)) as client:
        yield client


def test_a_recipe_may_be_given_in_four_ways(client: Client, tmp_path: Path) -> None:
    """A file, text, a dictionary and a Recipe become the same job; a Recipe's overrides are kept."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    data = {"model": {"id": "org/model"}, "calibration": {"dataset": "org/text"}, "depth": {"remove": 1}}
    given = (tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml"), RECIPE, data, Recipe.parse(RECIPE))
    for one in given:
        job = client.submit(one, name="mine").refresh()
        assert Recipe.parse(job.recipe).model_dump() == Recipe.parse(RECIPE).model_dump()
    changed = client.submit(Recipe.parse(RECIPE, ["depth.remove=2"]), ["depth.criterion.kind=angular"]).refresh()
    assert changed.overrides == ("depth.remove=2", "depth.criterion.kind=angular")
    with pytest.raises(TypeError, match=r"'gpu' is no argument here; .* did you mean 'gpus'"):
        client.submit(RECIPE, gpu=1)  # type: ignore[call-arg]
    assert client.check(RECIPE).valid
    assert "needs at least one of" in client.check(RECIPE + "width: {}\n").problems[0]
    with pytest.raises(RecipeError, match=r"nowhere\.yaml cannot be read: No such file"):
        client.submit("nowhere.yaml")


def test_a_job_from_submission_to_report(harness: ServiceHarness, client: Client, tmp_path: Path) -> None:
    """Events, log, figures, files, archive and report of one job, each with its type."""
    job = client.submit(recipe(layers=3, say="first line"), name="mine", gpus=0)
    assert (job.state, repr(job)) == ("queued", f"<job {job.id} 'mine': queued>")
    with harness.supervised():
        done = job.wait(timeout=60, check=True)
    assert (done.state, done.figures and done.figures.layers, job.state) == ("succeeded", (4, 3), "succeeded")
    events = list(job.events())
    assert [events[0].state, events[-1].state, events[-1].kind] == ["queued", "succeeded", "state"]
    assert list(job.events(after=events[-2].event_id)) == events[-1:]
    assert list(job.log()) == list(job.log(follow=True)) == ["first line"]
    with pytest.raises(OutputError, match=r"the report of job .* has schema None"):
        job.report()
    folder = harness.run_folder(job.id)
    (folder / "report.json").write_text(sample_report().model_dump_json())
    assert job.report().dense == sample_report().dense
    assert job.report_page().html == (folder / "report.html").read_text()
    paths = job.fetch(tmp_path / "out", model_only=True)
    assert [path.read_bytes() for path in paths] == [(folder / "model" / "model.safetensors").read_bytes()]
    whole, model = job.archive(tmp_path / "all.tar"), job.archive(tmp_path / "model.tar", model_only=True)
    assert whole.stat().st_size > model.stat().st_size > paths[0].stat().st_size
    with pytest.raises(OutputError, match="exists already"):
        job.archive(tmp_path / "all.tar")
    assert [one.figures for one in client.compare([job]).jobs] == [done.figures]
    job.delete()
    with pytest.raises(NotFound, match="there is no job") as caught:
        job.refresh()
    assert caught.value.status == 404


def test_what_can_be_done_with_a_job(harness: ServiceHarness, client: Client) -> None:
    """Cancel, retry, evaluate more samples and push; wait ends in time, and reports a failure where it is asked to."""
    job = client.submit(recipe(pause=60))
    with pytest.raises(TimeoutError, match="is queued after 0 s"):
        job.wait(timeout=0)
    assert job.cancel().state == "cancelled"
    with pytest.raises(JobFailed, match=f"job {job.id} .*: cancelled after"):
        job.wait(check=True)
    with pytest.raises(StateConflict):
        job.cancel()
    assert job.retry().state == "queued"
    job.cancel()
    undecided = client.submit(recipe(exit=3, verdict="not enough samples"))
    with harness.supervised():
        assert undecided.wait().state == "gate_undecided"
        assert undecided.reevaluate(500).reevaluate == 500
        undecided.wait()
        push = undecided.push("hf_of_this_push", repo_id="org/pruned", private=True)
        published = push.wait(check=True).published
    assert published is not None
    assert published.repo_id == "org/pruned"
    assert [one.id for one in undecided.pushes()] == [push.id]


def test_jobs_are_listed_over_pages(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further pages are asked for as they are needed, up to the limit."""
    monkeypatch.setattr(sync_client, "_PAGE", 2)
    made = [client.submit(RECIPE, name="listed").id for _ in range(5)]
    assert [job.id for job in client.jobs(search="listed")] == made[::-1]
    assert [job.id for job in client.jobs(search="listed", limit=3)] == made[:1:-1]
    assert client.page(search="listed", limit=1).jobs[0].id == made[-1]
    assert client.queue().counts["queued"] >= 5


def test_a_lost_answer_queues_nothing_twice(harness: ServiceHarness) -> None:
    """A submission whose answer is lost is sent again under the same key."""
    lost: list[str] = []

    def lossy(request: httpx.Request) -> httpx.Response:
        answer = harness.forward(request)
        if request.method == "POST" and not lost:
            lost.append(request.headers["Idempotency-Key"])
            raise httpx.RemoteProtocolError("peer closed connection", request=request)
        return answer

    with harness.client(lossy, pause=lambda _: None) as client:
        job = client.submit(RECIPE, name="sent twice")
        assert [one.id for one in client.jobs(search="sent twice")] == [job.id]
    assert lost


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AccessDenied), (403, AccessDenied), (404, NotFound), (409, StateConflict), (413, ServiceError),
        (429, ServiceBusy), (503, ServiceBusy), (507, ServiceBusy), (500, ServiceError),
    ],
)  # fmt: skip
def test_a_refusal_is_an_exception_of_its_kind(status: int, kind: type[ServiceError]) -> None:
    """The exception has the service's sentence and the status, and is of the kind of the status."""
    problem = httpx.Response(status, json={"detail": "because of that", "problems": []})
    with talking_to(lambda _: problem) as client, pytest.raises(ServiceError, match="because of that") as caught:
        client.queue()
    assert (type(caught.value), caught.value.status) == (kind, status)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLMPRUNE_SERVER and LLMPRUNE_TOKEN are used where nothing is given."""
    monkeypatch.setenv("LLMPRUNE_SERVER", "http://pruner:8321/")
    monkeypatch.setenv("LLMPRUNE_TOKEN", "secret")
    with Client() as client:
        assert client.server == "http://pruner:8321"
        assert client.connection.http.headers["Authorization"] == "Bearer secret"


def asynchronous(harness: ServiceHarness, work: Callable[[AsyncClient], Any]) -> Any:
    """Run a coroutine with a client of the service."""

    async def run() -> Any:
        async def no_pause(_: float) -> None:
            await asyncio.sleep(0.05)

        transport = httpx.ASGITransport(app=harness.app)
        async with AsyncClient(BASE, transport=transport, pause=no_pause) as client:
            return await work(client)

    with harness.supervised():
        return asyncio.run(run())


def test_the_asynchronous_client(harness: ServiceHarness, tmp_path: Path) -> None:
    """Several jobs at once: waiting, events, log, files and errors as in the blocking client."""

    async def work(client: AsyncClient) -> list[str]:
        jobs = [await client.submit(recipe(layers=1, number=number), name=f"at once {number}") for number in range(2)]
        done = await asyncio.gather(*(job.wait(check=True) for job in jobs))
        assert [one.state async for one in jobs[0].events()][-1] == "succeeded"
        assert [line async for line in jobs[0].log(follow=True)] == ["working"]
        assert {job.id async for job in client.jobs(search="at once")} == {job.id for job in jobs}
        paths = await jobs[0].fetch(tmp_path / "out", model_only=True)
        assert [path.name for path in paths] == ["model.safetensors"]
        await jobs[0].archive(tmp_path / "all.tar")
        await jobs[0].progress()
        assert jobs[0].state == "succeeded"
        with pytest.raises(StateConflict):
            await jobs[0].cancel()
        return [one.state for one in done]

    assert asynchronous(harness, work) == ["succeeded"] * 2
