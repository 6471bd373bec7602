"""Times of a run's parts as earlier runs of the same model on the same machine measured them.

An estimate counts operations, and the rates are those of a machine that does nothing else. What a part really took,
divided by its estimate, corrects the next estimate for this model. Parts without an estimate, such as tasks, are
expected to take as long as the last time with the same settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field, ValidationError

from llmprune.common.errors import DiskError
from llmprune.common.files import write_text
from llmprune.common.progress import expecting
from llmprune.common.time_left import ExpectedPart
from llmprune.planning.duration.estimate import Durations, summed
from llmprune.planning.duration.rates import rates_file
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.base import Figures

_FILE = "measured_times.json"  # beside the rates
_MOST_KEPT = 200  # models and machines in the file
_MOST_PARTS = 100  # of one model
_SHORTEST = 0.1  # seconds of an estimate that a measurement is divided by
_MAX_PACE = 10.0


class MeasuredTimes(Figures):
    """Measurements of one model on one machine, by the name of a part."""

    pace: dict[str, float] = Field(default_factory=dict)  # measured / estimated seconds
    seconds: dict[str, float] = Field(default_factory=dict)  # of parts without an estimate, by name and settings

    def applied(self, parts: tuple[ExpectedPart, ...], *, settings: str) -> tuple[ExpectedPart, ...]:
        """Return the parts with the seconds that these measurements expect. ``settings``: digest of the recipe's."""
        return tuple(replace(part, measured=self._expected(part, settings)) for part in parts)

    def updated(self, parts: tuple[ExpectedPart, ...], times: dict[str, float], *, settings: str) -> MeasuredTimes:
        """Return the measurements with those of a run; a pace is the geometric mean of the old and the new one."""
        pace, seconds = dict(self.pace), dict(self.seconds)
        for part in parts:
            took = times.get(part.name)
            if took is None:
                continue
            if part.seconds is None:
                seconds[f"{part.name} {settings}"] = round(took, 3)
            elif part.seconds >= _SHORTEST:
                new = min(max(took / part.seconds, 1 / _MAX_PACE), _MAX_PACE)
                pace[part.name] = round(math.sqrt(pace.get(part.name, new) * new), 4)
        return MeasuredTimes(pace=pace, seconds=dict(list(seconds.items())[-_MOST_PARTS:]))

    def _expected(self, part: ExpectedPart, settings: str) -> float | None:
        if part.seconds is None:
            return self.seconds.get(f"{part.name} {settings}")
        pace = self.pace.get(part.name)
        return None if pace is None else part.seconds * pace


@contextmanager
def expecting_durations(durations: Durations | None, recipe: Recipe) -> Iterator[None]:
    """Report the time left of a run while the context lasts, and keep the times of its parts for the next run.

    ``durations``: None in processes other than the first.
    """
    if durations is None:
        with expecting(()):
            yield
        return
    name, settings = _name(durations, recipe), _settings(recipe)
    parts = durations.expected()
    with expecting(_read().get(name, MeasuredTimes()).applied(parts, settings=settings)) as forecast:
        try:
            yield
            forecast.finish()
        finally:
            _keep(name, parts, times=forecast.times, settings=settings)


def as_measured(durations: Durations, recipe: Recipe) -> Durations:
    """Return the durations with the seconds that earlier runs of the recipe's model let expect."""
    known = _read().get(_name(durations, recipe))
    if known is None:
        return durations
    expected = known.applied(durations.expected(), settings=_settings(recipe))
    parts = tuple(
        part.model_copy(update={"seconds": one.expected}) for part, one in zip(durations.parts, expected, strict=True)
    )
    total, dominant = summed(parts)
    return durations.model_copy(update={"parts": parts, "total": total, "dominant": dominant})


def _keep(name: str, parts: tuple[ExpectedPart, ...], *, times: dict[str, float], settings: str) -> None:
    """Add the times of a run's finished parts to the file."""
    if not times:
        return
    known = _read()
    updated = {name: known.pop(name, MeasuredTimes()).updated(parts, times, settings=settings)} | known
    content = {one: updated[one].model_dump() for one in list(updated)[:_MOST_KEPT]}
    with suppress(DiskError, OSError):  # the next run has the estimates
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")


def _path() -> Path:
    return rates_file().with_name(_FILE)


def _read() -> dict[str, MeasuredTimes]:
    """Return the kept measurements, the newest first; none where the file is missing or damaged."""
    try:
        content = json.loads(_path().read_text(encoding="utf-8"))
        return {name: MeasuredTimes(**values) for name, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, ValidationError):
        return {}


def _name(durations: Durations, recipe: Recipe) -> str:
    """Return the name of what the pace depends on."""
    machine = (platform.node(), durations.device, torch.get_num_threads(), durations.processes)
    return ", ".join(map(str, (*machine, recipe.model.id, recipe.model.dtype)))


def _settings(recipe: Recipe) -> str:
    """Return a digest of the settings that parts without an estimate depend on."""
    sections = (recipe.evaluation, recipe.recover)
    text = json.dumps([None if one is None else one.model_dump_json() for one in sections])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
