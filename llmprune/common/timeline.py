"""Steps of a run in the order of their time: finished ones with their seconds, the current one, and those to come."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llmprune.common.time_left import Forecast

LAST = "report"  # step that ends every run with a forecast
_MOST_STEPS = 60  # that are listed; of a run with many rounds the oldest are left out


@dataclass
class StepTime:
    """Step of a run. ``seconds``: spent in it so far; ``expected``: in all, by the forecast; None: unknown."""

    name: str
    state: Literal["done", "reused", "current", "to come"]
    seconds: float | None = None
    expected: float | None = None


@dataclass
class Timeline:
    """Steps as the run reports them. ``clock``: seconds, never decreasing."""

    clock: Callable[[], float] = time.monotonic
    _ended: list[StepTime] = field(default_factory=list)
    _current: str | None = None
    _began: float = 0.0
    _expected: float | None = None

    def note(self, reported: str, forecast: Forecast | None) -> None:
        """Record a report of progress, after the forecast has recorded it."""
        name = step_of(reported, forecast)
        if name == self._current:
            return
        self._end_current()
        expected = forecast.expected_of(name) if forecast is not None else None
        self._current, self._began, self._expected = name, self.clock(), expected

    def reuse(self, step: str) -> None:
        """Record a step whose result exists."""
        if not any(one.name == step and one.state == "reused" for one in self._ended):
            self._ended.append(StepTime(step, "reused"))

    def steps(self, forecast: Forecast | None) -> list[dict[str, Any]]:
        """Return all steps, as JSON values with rounded seconds."""
        found = list(self._ended[-_MOST_STEPS:])
        if self._current is not None:
            found.append(StepTime(self._current, "current", self.clock() - self._began, self._expected))
        if forecast is not None and self._current != LAST:
            found += [StepTime(name, "to come", None, seconds) for name, seconds in forecast.to_come().items()]
            found.append(StepTime(LAST, "to come"))
        return [
            {name: round(value, 1) if isinstance(value, float) else value for name, value in asdict(one).items()}
            for one in found
        ]

    def _end_current(self) -> None:
        if self._current is not None:
            self._ended.append(StepTime(self._current, "done", self.clock() - self._began, self._expected))


def step_of(reported: str, forecast: Forecast | None) -> str:
    """Return the step that a reported name belongs to, such as ``pass 2`` for ``pass 2: cut and refit``."""
    part = forecast.part_of(reported) if forecast is not None else None
    return part.step if part is not None else re.split(r"[:(]", reported)[0].strip()
