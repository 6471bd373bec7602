"""Times of earlier runs: kept beside the rates, by machine and model, and expected of the next run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.recipes import BASE

from llmprune.common import progress
from llmprune.common.time_left import TimeLeft
from llmprune.planning.duration import measured
from llmprune.planning.duration.estimate import Durations, PartDuration
from llmprune.planning.duration.measured import expecting_durations
from llmprune.planning.duration.rates import Rates
from llmprune.recipe.recipe import Recipe

RATES = Rates(products=2e9, plain_products=1e9, sums=5e8, stream=1e10, narrow=5e9, copies=1e9, files=1e8, call=1e-6)
PARTS = (
    PartDuration(step="pass 1", name="pass 1: scoring layers", seconds=10.0, items=4),
    PartDuration(step="evaluation", name="tasks: dense", seconds=None),
)
PLANNED = Durations(parts=PARTS, total=10.0, dominant="pass 1", device="one", processes=1, rates=RATES)
RECIPE = Recipe.parse(f"{BASE}depth: {{remove: 1}}\nevaluation: {{tasks: [arc_easy]}}\n")
OTHER_TASKS = Recipe.parse(f"{BASE}depth: {{remove: 1}}\nevaluation: {{tasks: [hellaswag]}}\n")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of measured times that no other test uses."""
    path = tmp_path / "cache" / "measured_times.json"
    monkeypatch.setattr(measured, "_path", lambda: path)
    return path


def _run(
    recipe: Recipe, clock: list[float], *, times: dict[str, float], last: Callable[[], object] = str
) -> TimeLeft | None:
    """Run the parts in these times, then call ``last``; return the time left at the beginning."""
    with expecting_durations(PLANNED, recipe):
        forecast = progress._forecast
        assert forecast is not None
        forecast.clock = lambda: clock[0]
        left = forecast.left()
        for name, seconds in times.items():
            forecast.note(name)
            clock[0] += seconds
        last()
    return left


def test_the_next_run_of_the_model_expects_what_was_measured() -> None:
    """Estimates are corrected; parts without one, such as tasks, take as long as the last time with these settings."""
    clock = [0.0]
    first = _run(RECIPE, clock, times={"pass 1: scoring layers": 25.0, "tasks: dense": 40.0})
    assert first == TimeLeft(10.0, is_complete=False, is_measured=False)
    again = _run(RECIPE, clock, times={})
    assert again == TimeLeft(65.0, is_complete=True, is_measured=True)
    other = _run(OTHER_TASKS, clock, times={})
    assert other == TimeLeft(25.0, is_complete=False, is_measured=True)


def test_two_measurements_are_weighed_alike_and_a_failed_run_counts_its_finished_parts() -> None:
    """The pace is their geometric mean; the part in which a run stops is not counted."""
    clock = [0.0]
    _run(RECIPE, clock, times={"pass 1: scoring layers": 40.0})
    with pytest.raises(ZeroDivisionError):
        _run(RECIPE, clock, times={"pass 1: scoring layers": 10.0, "tasks: dense": 99.0}, last=lambda: 1 / 0)
    left = _run(RECIPE, clock, times={})
    assert left == TimeLeft(20.0, is_complete=False, is_measured=True)


def test_a_damaged_file_is_no_error(kept: Path) -> None:
    """The estimates are used, and the next measurement replaces it."""
    kept.parent.mkdir()
    kept.write_text('{"x": {"pace": 3}}')
    clock = [0.0]
    assert _run(RECIPE, clock, times={"pass 1: scoring layers": 30.0}) == TimeLeft(10.0, False, False)
    assert _run(RECIPE, clock, times={}) == TimeLeft(30.0, False, True)
