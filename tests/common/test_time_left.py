"""Time left of a whole run, as the parts of its plan begin and end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmprune.common import progress
from llmprune.common.time_left import ExpectedPart, Forecast, TimeLeft, rough_duration
from llmprune.common.timeline import Timeline

PARTS = (
    ExpectedPart("pass 1", "pass 1: scoring layers", 30.0, items=10),
    ExpectedPart("pass 2", "pass 2: cut and refit", 60.0, items=10),
    ExpectedPart("saving", "saving", 10.0),
)


class Clock:
    """A clock that a test moves. ``now``: seconds."""

    now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def _forecast(*parts: ExpectedPart) -> tuple[Forecast, Clock]:
    clock = Clock()
    return Forecast(parts or PARTS, clock), clock


def _seconds(forecast: Forecast) -> float:
    left = forecast.left()
    assert left is not None
    return left.seconds


def _walk(forecast: Forecast, clock: Clock, *, each: float) -> Iterator[float]:
    """Report a run whose layers take ``each`` seconds in pass 1 and twice that in pass 2; yield the time left."""
    for part, seconds in ((PARTS[0], each), (PARTS[1], 2 * each)):
        began = clock.now
        for done in range(10):
            forecast.note(part.name, done, total=10, since=began)
            yield _seconds(forecast)
            clock.now += seconds
    forecast.note("saving")
    yield _seconds(forecast)


def test_before_the_first_part_all_estimates_are_left() -> None:
    """A run that has not begun takes what its plan says."""
    forecast, _ = _forecast()
    assert _seconds(forecast) == 100.0


@pytest.mark.parametrize("pace", [0.5, 1.0, 3.0])
def test_the_time_left_follows_the_measured_pace(pace: float) -> None:
    """A machine that is faster or slower than estimated shows in the parts to come, and the time left then shrinks."""
    forecast, clock = _forecast()
    left = list(_walk(forecast, clock, each=3 * pace))
    settled = left[5:]
    assert settled == sorted(settled, reverse=True)
    assert _seconds(forecast) == pytest.approx(10 * pace, rel=0.1)
    assert left[10] == pytest.approx(70 * pace, rel=0.15)


def test_the_time_left_shrinks_between_reports_and_is_never_negative() -> None:
    """The clock counts it down; a part that takes longer than expected leaves 0, not less."""
    forecast, clock = _forecast(PARTS[2])
    forecast.note("saving")
    clock.now += 4
    assert _seconds(forecast) == pytest.approx(6)
    clock.now += 1000
    assert _seconds(forecast) == 0


def test_a_single_slow_moment_does_not_decide() -> None:
    """The first seconds weigh little, and the pace is bounded."""
    forecast, clock = _forecast()
    forecast.note(PARTS[0].name, 0, total=10, since=clock.now)
    began, clock.now = clock.now, clock.now + 1e6
    forecast.note(PARTS[0].name, 1, total=10, since=began)
    forecast.note("saving")
    assert _seconds(forecast) <= 10 * 10


def test_reused_steps_and_skipped_parts_take_no_time() -> None:
    """A continued run expects only what is left to do, and its first pace is not that of reused steps."""
    forecast, _ = _forecast()
    forecast.reuse("pass 1")
    assert _seconds(forecast) == 70
    forecast.note("saving")
    assert _seconds(forecast) == pytest.approx(10)


def test_a_part_whose_result_exists_does_not_make_the_machine_look_fast() -> None:
    """Only its step was reported, then the next part of the step began: it tells nothing of how long that takes."""
    predictions, training = ExpectedPart("recovery", "predictions", 100.0), ExpectedPart("recovery", "training", 60.0)
    forecast, clock = _forecast(predictions, training)
    forecast.note("recovery")
    clock.now += 1
    forecast.note("training")
    assert _seconds(forecast) == pytest.approx(60)
    assert not forecast.times


def test_a_resumed_pass_counts_the_layers_that_are_left() -> None:
    """A snapshot leaves fewer layers: they take their share of the estimate, and do not make the machine look fast."""
    forecast, clock = _forecast()
    began = clock.now
    forecast.note(PARTS[1].name, 0, total=2, since=began)
    assert _seconds(forecast) == pytest.approx(12 + 10)
    clock.now += 6
    forecast.note(PARTS[1].name, 1, total=2, since=began)
    assert _seconds(forecast) == pytest.approx(6 + 10)
    clock.now += 6
    forecast.note("saving")
    assert _seconds(forecast) == pytest.approx(10)


def test_a_part_without_an_estimate_makes_the_time_left_a_lower_bound() -> None:
    """While the tasks are to come or run, the known rest is stated as incomplete; after them it is complete."""
    tasks, speed = ExpectedPart("evaluation", "tasks: dense", None), ExpectedPart("evaluation", "speed", 20.0)
    forecast, clock = _forecast(PARTS[2], tasks, speed)
    told = (("saving", 10, 30, False), ("tasks: dense", 500, 20, False), ("speed", 0, 20, True))
    for name, takes, seconds, complete in told:
        forecast.note(name)
        left = forecast.left()
        assert left is not None
        assert (pytest.approx(left.seconds), left.is_complete) == (seconds, complete)
        clock.now += takes
    clock.now += 5
    forecast.note("evaluation")  # the step's own name, within it
    assert _seconds(forecast) == pytest.approx(15)
    assert Forecast((tasks,), clock).left() is None


def test_the_estimate_of_a_step_is_that_of_its_parts() -> None:
    """Parts that follow each other add up; a step that comes again, such as a plain forward pass, counts once."""
    parts = [ExpectedPart("forward", "forward", 5.0), *PARTS, ExpectedPart("forward", "forward", 5.0)]
    more = [*parts, ExpectedPart("evaluation", "text", 3.0), ExpectedPart("evaluation", "speed", 4.0)]
    forecast, _ = _forecast(*more)
    assert [forecast.estimate(step) for step in ("forward", "pass 2", "evaluation", "other")] == [5, 60, 7, None]


def test_reports_of_other_work_belong_to_the_part_under_way() -> None:
    """The calibration check runs pass 1 again; what its bars say is not the part's own progress."""
    forecast, clock = _forecast(PARTS[0], ExpectedPart("calibration check", "calibration check", 40.0), PARTS[2])
    forecast.note(PARTS[0].name)
    clock.now += 30
    forecast.note("calibration check")
    forecast.note(PARTS[0].name, 5, total=10, since=clock.now - 1000)
    assert _seconds(forecast) == pytest.approx(50)


def test_lines_and_file_tell_the_time_left_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A new step's line says it; the file for a service has it too, with whether a measurement confirms it."""
    monkeypatch.setenv(progress.PROGRESS_FILE, str(tmp_path / "progress.json"))
    with progress.lines_without_terminal():
        with progress.expecting([ExpectedPart("pass 1", "pass 1", 1200.0, items=4)]):
            progress.report_progress("pass 1", 0, total=4)
            assert progress.estimated_seconds("pass 1") == 1200
            told = json.loads((tmp_path / "progress.json").read_text())
            assert (told["run_seconds_left"], told["left"]["is_measured"]) == (None, False)
            assert told["left"]["seconds"] == pytest.approx(1200, abs=5)
            progress.report_progress("pass 1", 1, total=4, since=time.monotonic() - 300)
            told = json.loads((tmp_path / "progress.json").read_text())
            assert told["run_seconds_left"] == round(told["left"]["seconds"], 1) == pytest.approx(900, abs=5)
            assert told["steps"][-2:] == [
                {"name": "pass 1", "state": "current", "seconds": told["steps"][-2]["seconds"], "expected": 1200.0},
                {"name": "report", "state": "to come", "seconds": None, "expected": None},
            ]
        progress.report_progress("saving")
    lines = capfd.readouterr().err.splitlines()
    assert [line[9:] for line in lines] == ["pass 1, 4 to do, about 20 min left in all", "saving"]
    assert json.loads((tmp_path / "progress.json").read_text())["run_seconds_left"] is None


def test_an_earlier_measurement_takes_the_place_of_the_estimate() -> None:
    """The time left then counts as measured from the first moment; the estimate of the step itself stays the plan's."""
    parts = [replace(part, measured=2 * (part.seconds or 0.0)) for part in PARTS]
    forecast, _ = _forecast(*parts, ExpectedPart("tasks", "tasks", None, measured=30.0))
    left = forecast.left()
    assert left is not None
    assert (left.seconds, left.is_known) == (230.0, True)
    assert forecast.estimate("pass 1") == 30.0
    assert forecast.estimate("tasks") is None


def test_the_time_left_is_known_once_a_part_of_the_run_was_measured() -> None:
    """Before that it is an estimate only."""
    forecast, clock = _forecast()
    known = []
    for _ in _walk(forecast, clock, each=3.0):
        left = forecast.left()
        assert left is not None
        known.append(left.is_known)
    assert known[:2] == [False, False]
    assert all(known[2:])
    forecast.finish()
    assert {name: round(seconds) for name, seconds in forecast.times.items()} == {
        "pass 1: scoring layers": 30, "pass 2: cut and refit": 60, "saving": 0,
    }  # fmt: skip


def test_a_round_before_the_last_tells_no_time_of_the_whole_run() -> None:
    """Its own time left is a lower bound only."""
    with progress.expecting(PARTS):
        with progress.more_runs_follow(), progress.more_runs_follow(False):
            assert progress.time_left() == TimeLeft(100.0, is_complete=False, is_measured=False)
        assert progress.time_left() == TimeLeft(100.0, is_complete=True, is_measured=False)


def test_the_steps_of_a_run_are_a_timeline() -> None:
    """Steps that are done have their time, those to come their estimate, and what exists already is marked."""
    forecast, clock = _forecast()
    timeline = Timeline(clock)
    for name, seconds in (("planning", 2), ("pass 1: scoring layers", 30), ("pass 1: scoring layers", 0)):
        forecast.note(name)
        timeline.note(name, forecast)
        clock.now += seconds
    forecast.reuse("saving")
    timeline.reuse("saving")
    forecast.note("pass 2: cut and refit")
    timeline.note("pass 2: cut and refit", forecast)
    clock.now += 5
    assert [(one["name"], one["state"], one["seconds"]) for one in timeline.steps(forecast)] == [
        ("planning", "done", 2.0), ("saving", "reused", None), ("pass 1", "done", 30.0),
        ("pass 2", "current", 5.0), ("report", "to come", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (49.4, "49 s"), (720, "12 min"), (7500, "2 h 5 min"), (72_000, "20 h"), (600_000, "6 days")],
)
def test_estimates_are_written_roughly(seconds: float, text: str) -> None:
    """An estimate has no more digits than it deserves."""
    assert rough_duration(seconds) == text
