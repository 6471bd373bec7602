"""Sweeps whose jobs share scores: who scores, who waits for whom, and what a failure or a kill changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.service import RECIPE, YAML, ServiceHarness, recipe

from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder.earlier_products import SCORES
from llmprune.results.run_folder.products import JOURNAL
from llmprune.service.jobs.job import Job, Outcome, State
from llmprune.service.jobs.sweeps.shared_scores import WAITS, key_of_scores
from llmprune.service.monitoring.queue_estimate import QueueState, places_of
from llmprune.service.supervisor.attempts import launch_of
from llmprune.service.supervisor.devices import Machine
from llmprune.service.supervisor.score_sharing import ScoreSharing

PAGE = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> ServiceHarness:
    """A service whose jobs start only where a test says so."""
    return ServiceHarness(tmp_path_factory.mktemp("scores"), slots=3, rate=1e6, burst=10**6)


def sweep(harness: ServiceHarness, text: str = RECIPE) -> list[str]:
    """Submit a sweep over the number of layers, and return its jobs."""
    params = {"vary": ["depth.remove=1,2,3"]}
    answer = harness.http.post("/v1/sweeps", content=text, params=params, headers=YAML)
    assert answer.status_code == 201, answer.text
    return [one["job"]["id"] for one in answer.json()["jobs"]]


def start(harness: ServiceHarness) -> None:
    """Mark the jobs as running that wait for no scores, as a supervisor does that was just started."""
    store = harness.service.jobs
    ready, sources = ScoreSharing(harness.settings, store).choose(store.in_states("queued"))
    for job in ready:
        store.start(job.id, [], scores_of=sources.get(job.id))


def states(harness: ServiceHarness, jobs: list[str]) -> list[str]:
    """Return the states of jobs once those have started that may."""
    start(harness)
    return [found(harness, job).state for job in jobs]


def found(harness: ServiceHarness, job: str) -> Job:
    """Return a job as it is now."""
    row = harness.service.jobs.get(job)
    assert row is not None
    return row


def end(harness: ServiceHarness, job: str, state: State) -> None:
    """End a running job without a result, or with one that has no scores."""
    harness.service.jobs.end(job, Outcome(state))


def write_scores(harness: ServiceHarness, job: str) -> None:
    """Write what a run has once it has scored its model."""
    folder = harness.run_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES).write_bytes(b"scores")
    (folder / JOURNAL).write_text(json.dumps({"products": {"scores": {"fingerprint": "f", "steps": []}}}))


def test_the_first_job_scores_and_the_others_begin_with_its_scores(harness: ServiceHarness) -> None:
    """They wait, and say so, until the scores are there, not until the first job ends; other jobs pass them."""
    jobs = sweep(harness)
    other = harness.submit()["id"]
    assert states(harness, [*jobs, other]) == ["running", "queued", "queued", "running"]
    assert [found(harness, job).step for job in jobs[1:]] == [f"{WAITS} {jobs[0]}"] * 2
    waiting, none = [found(harness, jobs[1])], frozenset[str]()
    queue = QueueState(Machine((), 3), (), waiting, order=[jobs[1]], seconds={}, remote=none)
    assert places_of(queue)[jobs[1]].words == f"next in the queue; it {WAITS} {jobs[0]}"
    write_scores(harness, jobs[0])
    assert states(harness, jobs) == ["running"] * 3
    option = f"--scores-of={harness.run_folder(jobs[0]).absolute()}"
    given = [launch_of(found(harness, job), harness.settings).arguments for job in jobs]
    assert [option in arguments for arguments in given] == [False, True, True]
    page = harness.http.get("/v1/sweeps").json()[0]["id"]
    listed = harness.http.get(f"/v1/sweeps/{page}").json()["jobs"]
    assert [one["scores_of"] for one in listed] == [None, jobs[0], jobs[0]]
    text = harness.http.get(f"/sweeps/{page}", headers=PAGE).text
    assert text.count(f'began with the scores of <a href="/jobs/{jobs[0]}">') == 2
    end(harness, jobs[0], "failed")
    assert harness.http.delete(f"/v1/jobs/{jobs[0]}").status_code == 409  # its scores may still be read
    assert harness.http.post(f"/v1/jobs/{jobs[0]}/retry").status_code == 200
    harness.service.jobs.queue_again(jobs[2])  # the service was stopped
    assert states(harness, jobs) == ["running"] * 3
    assert [found(harness, job).reads for job in jobs] == [None, jobs[0], jobs[0]]


@pytest.mark.parametrize("how", ["cancelled", "failed", "deleted"])
def test_a_job_that_ends_without_a_result_holds_up_no_other(harness: ServiceHarness, how: str) -> None:
    """The next one scores the model; a retry of the first then takes the scores of that one."""
    jobs = sweep(harness)
    assert states(harness, jobs) == ["running", "queued", "queued"]
    end(harness, jobs[0], "failed" if how == "failed" else "cancelled")
    if how == "deleted":
        assert harness.http.delete(f"/v1/jobs/{jobs[0]}").status_code == 204
    assert states(harness, jobs[1:]) == ["running", "queued"]
    assert found(harness, jobs[1]).reads is None
    write_scores(harness, jobs[1])
    takers = [jobs[2]] if how == "deleted" else [jobs[2], jobs[0]]
    assert how == "deleted" or harness.http.post(f"/v1/jobs/{jobs[0]}/retry").status_code == 200
    assert states(harness, takers) == ["running"] * len(takers)
    assert {found(harness, job).reads for job in takers} == {jobs[1]}


def test_jobs_whose_first_has_no_scores_wait_no_more(harness: ServiceHarness) -> None:
    """Where a finished job of the group has none, each works by itself."""
    jobs = sweep(harness)
    start(harness)
    end(harness, jobs[0], "succeeded")
    assert states(harness, jobs[1:]) == ["running", "running"]
    assert [(found(harness, job).reads, found(harness, job).step) for job in jobs[1:]] == [(None, "starting")] * 2


def test_a_supervisor_runs_a_sweep_with_shared_scores(tmp_path: Path) -> None:
    """All jobs succeed, the later ones with the scores of the first."""
    harness = ServiceHarness(tmp_path, slots=3, rate=1e6, burst=10**6)
    jobs = sweep(harness, recipe(scores=1))
    assert [harness.until_ended(job)["state"] for job in jobs] == ["succeeded"] * 3
    assert [harness.job(job)["reads"] for job in jobs] == [None, jobs[0], jobs[0]]


SAME: list[dict[str, Any]] = [
    {"depth": {"remove": 2}}, {"depth": {"keep": 2}}, {"evaluation": {"speed": {}}}, {"refit": False},
    {"sparsity": {"pattern": "2:4"}},
]  # fmt: skip
OTHER: list[dict[str, Any]] = [
    {"depth": {"remove": 1, "criterion": {"kind": "angular"}}}, {"depth": {"remove": 1, "keep_pattern": True}},
    {"calibration": {"dataset": "org/text", "samples": 7}}, {"model": {"id": "org/other"}}, {"hidden": 0.9},
    {"depth": {"remove": 1}, "width": {"mlp": 0.5}},
]  # fmt: skip
BASE: dict[str, Any] = {
    "model": {"id": "org/model"}, "calibration": {"dataset": "org/text"}, "depth": {"remove": 1},
}  # fmt: skip


def key(**changes: Any) -> str | None:
    """Return the key of a recipe with other sections."""
    return key_of_scores(Recipe.model_validate(BASE | changes))


@pytest.mark.parametrize("changes", SAME)
def test_sizes_and_what_comes_after_need_the_same_scores(changes: dict[str, Any]) -> None:
    """Numbers of layers, repair, zeros and measurements change no score."""
    assert key(**changes) == key() is not None


@pytest.mark.parametrize("changes", OTHER)
def test_model_text_and_criteria_need_other_scores(changes: dict[str, Any]) -> None:
    """Whatever scores depend on makes another key."""
    assert None is not key(**changes) != key()


def test_budgets_share_by_their_limits_and_some_recipes_share_nothing() -> None:
    """Sizes of one limit share; another limit, and a criterion that looks ahead by the layers removed, do not."""
    budgets = [
        key(depth=None, budget=budget) for budget in ({"parameters": 0.9}, {"parameters": 0.8}, {"weights": 0.8})
    ]
    assert budgets[0] == budgets[1] != budgets[2]
    ahead = [key(depth={"remove": number, "criterion": {"kind": "angular"}}) for number in (1, 2)]
    assert ahead[0] != ahead[1]
    assert key(depth={"layers": [1]}) is None
    assert key(depth=None, budget={"parameters": [0.9, 0.8]}) is None


def test_the_form_says_what_is_shared(harness: ServiceHarness) -> None:
    """Before a sweep is submitted its form tells whether the model is scored once."""
    form = {"recipe": RECIPE, "key_0": "depth.remove", "values_0": "1, 2"}
    assert "All need the same scores" in harness.http.post("/submit/sweep", data=form).text
    both = form | {"key_1": "calibration.samples", "values_1": "8, 16"}
    assert harness.http.post("/submit/sweep", data=both).text.count("2 need the same scores") == 2
    alone = form | {"key_0": "calibration.samples", "values_0": "8, 16"}
    assert "same scores" not in harness.http.post("/submit/sweep", data=alone).text
