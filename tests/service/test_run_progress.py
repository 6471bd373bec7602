"""Progress of a running job: its timeline, the time left in words, the throughput, and its place in the queue."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.service import ServiceHarness, recipe

from llmprune.service.jobs.job import Job
from llmprune.service.jobs.run_times import RunTimes, known_run_times
from llmprune.service.monitoring.queue_estimate import QueueState, places_of
from llmprune.service.monitoring.run_progress import RunProgress, progress_of
from llmprune.service.supervisor.devices import Machine
from llmprune.service.supervisor.progress import PROGRESS, read_progress

STEPS = [
    {"name": "planning", "state": "done", "seconds": 2.0, "expected": None},
    {"name": "saving", "state": "reused", "seconds": None, "expected": None},
    {"name": "pass 1", "state": "current", "seconds": 30.0, "expected": 40.0},
    {"name": "evaluation", "state": "to come", "seconds": None, "expected": 60.0},
]
REPORTED = {
    "step": "pass 1: scoring layers", "done": 12, "total": 16, "seconds": 30.0, "tokens": 4000, "steps": STEPS,
    "left": {"seconds": 70.0, "is_complete": True, "is_measured": True}, "run_seconds_left": 70.0,
}  # fmt: skip


def a_job(**values: Any) -> Job:
    """Return a running job."""
    known: dict[str, Any] = dict.fromkeys(Job.model_fields)
    known |= {
        "id": "0" * 12, "name": "one", "owner": "ann", "model": "org/model", "state": "running", "fraction": 0.0,
        "launcher": "local", "gpus": 0, "devices": (), "priority": 0, "attempts": 1, "ran_seconds": 32.0,
        "ran_before": 0.0, "shared": False, "uploaded": False,
        "cleaned": False, "created": 1.0, "seq": 1, "recipe": "", "overrides": (),
    }  # fmt: skip
    return Job(**{name: value for name, value in (known | values).items() if name in Job.model_fields})


def _progress(folder: Path, *, earlier: RunTimes | None = None, age: float = 0.0, **changes: Any) -> RunProgress:
    (folder / PROGRESS).write_text(json.dumps(REPORTED | changes))
    now = time.time()
    os.utime(folder / PROGRESS, (now - age, now - age))
    return progress_of(a_job(), folder, earlier=earlier)


def test_steps_throughput_and_time_left_are_shown(tmp_path: Path) -> None:
    """Each step has its words and its time; rates come from the current step."""
    progress = _progress(tmp_path)
    assert [(step.words, step.state) for step in progress.steps] == [
        ("Plan", "done"), ("Save", "reused"), ("Score", "current"), ("Evaluate", "to come"),
    ]  # fmt: skip
    assert progress.steps[2].fraction == 0.75
    assert (progress.items_per_minute, progress.tokens_per_second) == (24.0, 100.0)
    assert progress.throughput == "24 layers/min, 100 tokens/s"
    assert progress.left is not None
    assert (progress.left.kind, progress.left.words) == ("measured", "about 70 s left")
    assert read_progress(tmp_path, 0.0)["fraction"] == round(32 / 102, 4)


def test_time_passes_between_two_reports(tmp_path: Path) -> None:
    """The current step grows and the time left shrinks, but never below the steps to come."""
    progress = _progress(tmp_path, age=25.0)
    assert progress.steps[2].seconds == pytest.approx(55, abs=2)
    assert progress.left is not None
    assert progress.left.seconds == 60.0


LEFT = {"seconds": 100.0, "is_complete": True, "is_measured": False}


@pytest.mark.parametrize(
    ("left", "earlier", "kind", "words"),
    [
        (LEFT, None, "measuring", "measuring: between 60 s and 4 min left"),
        (LEFT | {"is_complete": False}, None, "at least", "at least 100 s left; a step to come has no estimate"),
        (None, None, "unknown", "starting; the time left is known within a minute or so"),
        (None, RunTimes(3, 92.0, 62.0, 122.0), "measured", "about 60 s left, as long as the last run of this recipe"),
    ],
)
def test_what_is_not_measured_is_not_said(
    left: dict[str, Any] | None, earlier: RunTimes | None, kind: str, words: str, tmp_path: Path
) -> None:
    """A range, a lower bound, the time of an earlier run, or nothing."""
    found = _progress(tmp_path, left=left, earlier=earlier, tokens=None).left
    assert found is not None
    assert (found.kind, found.words) == (kind, words)


@pytest.mark.parametrize("wrong", [{"steps": STEPS * 60}, {"steps": [{"name": "x", "state": "lost"}]}, {"left": 3}])
def test_a_wrong_file_shows_nothing(wrong: dict[str, Any], tmp_path: Path) -> None:
    """Neither a file that is too long nor one of another form is believed."""
    progress = _progress(tmp_path, **wrong)
    assert (progress.steps, progress.items_per_minute) == ([], None)


def test_a_job_that_has_ended_has_no_steps_to_come(tmp_path: Path) -> None:
    """Its timeline stays, without a future."""
    (tmp_path / PROGRESS).write_text(json.dumps(REPORTED))
    progress = progress_of(a_job(state="succeeded"), tmp_path, earlier=None)
    assert [step.state for step in progress.steps] == ["done", "reused", "done"]
    assert (progress.left, progress.items_per_minute) == (None, None)


def _places(
    *waiting: dict[str, Any], slots: int = 1, gpus: int = 0, paused: str | None = None, **seconds: float
) -> list[Any]:
    """Return kind and start of each waiting job behind the jobs ``run…`` of ``seconds``."""
    jobs = [a_job(id=f"wait{number}", state="queued", **values) for number, values in enumerate(waiting)]
    running = [a_job(id=name) for name in seconds if name.startswith("run")] or [a_job(id="run0")]
    queue = QueueState(
        machine=Machine(tuple(map(str, range(gpus))), slots), running=running, waiting=jobs,
        order=[*(job.id for job in jobs), "last"], seconds=seconds,
        remote=frozenset({"ray"}), paused=paused,
    )  # fmt: skip
    places = places_of(queue)
    assert (places["last"].kind, places["last"].position) == ("unknown", len(jobs) + 1)
    return [(places[job.id].kind, places[job.id].starts_in) for job in jobs]


def test_a_start_is_estimated_from_the_jobs_in_front() -> None:
    """Running jobs end when their time is over, waiting ones run as long as their kind did."""
    assert _places({}, {}, run0=100.0, wait0=50.0) == [("estimated", 100.0), ("estimated", 150.0)]
    assert _places({}, {}, slots=2, run0=100.0, run1=30.0, wait0=200.0) == [("estimated", 30.0), ("estimated", 100.0)]


def test_an_unknown_start_is_said_to_be_unknown() -> None:
    """Behind a job without an estimate there is a lower bound at most."""
    assert _places({}, {}, run0=100.0) == [("estimated", 100.0), ("at least", 100.0)]
    assert _places({}, {}) == [("unknown", None), ("unknown", None)]
    assert _places({"launcher": "ray"}, run0=1.0) == [("unknown", None)]
    assert _places({}, run0=1.0, paused="the disk is full") == [("unknown", None)]


def test_gpus_are_waited_for_as_the_supervisor_does() -> None:
    """A job that needs more GPUs than are free holds back those behind it that need some."""
    assert _places({"gpus": 2}, {"gpus": 1}, {}, slots=2, gpus=2, wait0=40.0) == [
        ("estimated", 0.0), ("estimated", 40.0), ("estimated", 0.0),
    ]  # fmt: skip
    assert _places({"gpus": 3}, gpus=2, run0=1.0) == [("unknown", None)]


def test_the_api_and_the_page_show_the_place_in_the_queue(tmp_path: Path) -> None:
    """A second job with the same recipe starts when the first one ends, as long as the last one of its kind ran."""
    harness = ServiceHarness(tmp_path)
    done = harness.submit(recipe(layers=1))["id"]
    harness.until_ended(done)
    found = harness.service.jobs.get(done)
    assert found is not None
    times = known_run_times(harness.service.database, [found])[done]
    assert (times.runs, times.last) == (1, found.ran_seconds)
    jobs = [harness.submit(recipe(layers=1))["id"] for _ in range(2)]
    harness.supervisor._write_heartbeat(time.monotonic())
    queue = harness.http.get(f"/v1/jobs/{jobs[1]}/progress").json()["queue"]
    assert (queue["position"], queue["waiting"], queue["kind"]) == (2, 2, "estimated")
    assert queue["starts_in"] == pytest.approx(times.last, abs=0.1)
    page = harness.http.get(f"/jobs/{jobs[1]}", headers={"Accept": "text/html"}).text
    assert "number 2 in the queue; starts " in page
    harness.service.jobs.cancel(jobs[0])
    assert harness.http.get(f"/v1/jobs/{jobs[0]}/progress").json()["queue"] is None
