"""Comparison of finished runs: warnings where figures cannot be compared, and differences of the recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

# Settings that the scores depend on.
_EVALUATION = ("suite", "tasks", "metrics", "include_path", "limit", "num_fewshot", "seed", "backend", "perplexity")
_MOST_NAMED = 5
_MAX_VALUE = 200  # characters of a value


class _Part(BaseModel):
    model_config = ConfigDict(from_attributes=True, extra="ignore", frozen=True)


class _Origin(_Part):
    model: str


class _Task(_Part):
    task: str
    metric: str = ""
    samples: int


class ComparedRun(_Part):
    """The part of a report that decides whether its figures can be compared; made from a Report or from its JSON."""

    provenance: _Origin
    recipe: dict[str, Any]
    tasks: tuple[_Task, ...] = ()

    @property
    def evaluation(self) -> dict[str, Any]:
        """Settings that the scores depend on."""
        given = self.recipe.get("evaluation") or {}
        return {name: given.get(name) for name in _EVALUATION}


@dataclass(frozen=True)
class Difference:
    """A key of the recipes whose values differ. ``values``: as text, by run; None: the run has none."""

    key: str
    values: tuple[str | None, ...]


def comparison_warnings(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    """Return a sentence for each difference that makes the runs' figures hard to compare."""
    warnings = []
    if len({run.provenance.model for run in runs}) > 1:
        warnings.append("the runs prune different models")
    if len({json.dumps(run.evaluation, sort_keys=True) for run in runs}) > 1:
        warnings.append("the runs were evaluated with different settings, so their scores are not comparable")
    elif differing := _tasks_of_other_samples(runs):
        named = ", ".join(differing[:_MOST_NAMED]) + (", …" if len(differing) > _MOST_NAMED else "")
        warnings.append(f"the runs were evaluated on different numbers of samples of {named}")
    return tuple(warnings)


def recipe_differences(recipes: Sequence[Mapping[str, Any] | None]) -> list[Difference]:
    """Return the keys whose values differ between recipes, sorted. None stands for a recipe that is unknown."""
    flat = [None if recipe is None else dict(_flat(recipe)) for recipe in recipes]
    keys = sorted({key for one in flat if one is not None for key in one})
    found = []
    for key in keys:
        known = [one.get(key) for one in flat if one is not None]
        if len(set(known)) > 1:
            found.append(Difference(key, tuple(None if one is None else one.get(key) for one in flat)))
    return found


def _tasks_of_other_samples(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the tasks that several runs evaluated, on different numbers of samples."""
    samples: dict[str, set[int]] = {}
    for run in runs:
        for task in run.tasks:
            samples.setdefault(task.task, set()).add(task.samples)
    return [task for task, numbers in samples.items() if len(numbers) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Return the values that are given, as text, by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key}", text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"
