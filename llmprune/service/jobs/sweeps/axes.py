"""Values of sweeps. The axes of a sweep: keys of the recipe with several values each, and the points that they span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from pydantic import Field

from llmprune.common.errors import RecipeError
from llmprune.results.formatting import plural
from llmprune.service.jobs.job import JobSummary, Value

MAX_AXES, MAX_POINTS = 4, 50  # keys; jobs of one sweep
_KEY = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*", re.ASCII)
_OPENING, _CLOSING = "[{", "]}"


class Axis(Value):
    """A key of the recipe and the values that it takes, as the texts of overrides."""

    key: str = Field(description="Key of the recipe, such as budget.parameters.")
    values: tuple[str, ...] = Field(description="Its values.")


class SweepSummary(Value):
    """A sweep as lists show it."""

    id: str
    name: str
    owner: str
    shared: bool
    axes: tuple[Axis, ...] = Field(description="Keys that differ between its jobs.")
    created: float = Field(description="Seconds since 1970.")


class SweepJob(Value):
    """A job of a sweep."""

    point: tuple[str, ...] = Field(description="Value of each key, in the order of the axes.")
    job: JobSummary
    scores_of: str | None = Field(
        None, description="Id of the job whose scores it began with; null: it scores the model, or has not started."
    )


class Sweep(SweepSummary):
    """A sweep with its jobs, but for those that were deleted."""

    jobs: list[SweepJob]


def axis_of(text: str) -> Axis:
    """Return the axis in a text such as ``budget.parameters=0.9,0.8``. Raises RecipeError."""
    key, equals, values = text.partition("=")
    if not equals:
        raise RecipeError(f"{text[:80]!r}: give KEY=VALUE,VALUE, such as budget.parameters=0.9,0.8", "sweep")
    return make_axis(key.strip(), values)


def make_axis(key: str, values: str) -> Axis:
    """Return an axis; commas within brackets and quotes belong to a value. Raises RecipeError."""
    found = tuple(dict.fromkeys(split_values(values)))
    if not _KEY.fullmatch(key):
        raise RecipeError(f"{key[:80]!r} is no key of a recipe; give one such as budget.parameters", "sweep")
    if not found or "" in found:
        raise RecipeError(f"{key}: a value is missing; separate values by commas, such as 0.9,0.8", "sweep")
    return Axis(key=key, values=found)


def split_values(text: str) -> list[str]:
    """Split a text at its commas, but for those within brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in _OPENING) - (sign in _CLOSING)
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def points_of(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return every combination of values. Raises RecipeError above a limit, or for a key that comes twice."""
    keys = [axis.key for axis in axes]
    repeated = next((key for key in keys if keys.count(key) > 1), None)
    number = math.prod(len(axis.values) for axis in axes)
    if repeated:
        raise RecipeError(f"{repeated} is given twice; give all of its values at once", "sweep")
    if not axes or number < 2:
        raise RecipeError("a sweep needs a key with two values or more, such as budget.parameters=0.9,0.8", "sweep")
    if len(axes) > MAX_AXES or number > MAX_POINTS:
        raise RecipeError(
            f"{plural(len(axes), 'key')} with {number:,} combinations; a sweep has at most {MAX_AXES} keys and "
            f"{MAX_POINTS} combinations: give fewer values",
            "sweep",
        )
    return list(itertools.product(*(axis.values for axis in axes)))


def describe_point(axes: Sequence[Axis], point: Sequence[str]) -> str:
    """Describe a point, such as ``parameters 0.9, mlp 0.5``: the last part of each key, and the value."""
    names = [axis.key.rsplit(".", 1)[-1] for axis in axes]
    shown = [axis.key if names.count(name) > 1 else name for axis, name in zip(axes, names, strict=True)]
    return ", ".join(f"{name} {value}" for name, value in zip(shown, point, strict=True))
