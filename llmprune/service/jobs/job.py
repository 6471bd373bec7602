"""A job: one recipe on its way through the service.

queued ──▶ running ──▶ succeeded, gate_not_met, gate_undecided   (the model is there)
  ▲  │        │  └───▶ failed ──▶ queued   (retry: continues the run folder)
  │  ▼        ▼
  │ cancelled ◀── cancelling
  └────┘

A finished job goes back to queued to evaluate more samples of its model (``reevaluate``).
A job with a ``source`` is a push: it sends that job's finished model to the hub.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, WithJsonSchema

from llmprune.publish.published import Published
from llmprune.recipe.hub import Hub
from llmprune.results.evaluation_figures import Verdict

State = Literal["queued", "running", "cancelling", "cancelled", "failed", "gate_not_met", "gate_undecided", "succeeded"]
ACTIVE: tuple[State, ...] = ("running", "cancelling")
FINISHED: tuple[State, ...] = ("gate_not_met", "gate_undecided", "succeeded")  # a verified model is there
ENDED: tuple[State, ...] = ("cancelled", "failed", *FINISHED)
VERDICTS: dict[Verdict, State] = {
    "pass": "succeeded",
    "fail": "gate_not_met",
    "not enough samples": "gate_undecided",
    "no interval": "gate_undecided",
}
# JSON has no infinity: it is written as a string, which reads back as the number.
_STRINGS = {"type": "string", "enum": ["Infinity", "-Infinity", "NaN"]}
Number = Annotated[float, WithJsonSchema({"anyOf": [{"type": "number"}, _STRINGS]})]
JOB_ID = "[0-9a-f]{12}"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figures(_Value):
    """What a job's report says of its result, for lists and comparisons."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    parameters: tuple[int, int] = Field(description="Dense and pruned.")
    bytes: tuple[int, int] = Field(description="Of the weights, dense and pruned.")
    layers: tuple[int, int]
    perplexity: tuple[Number, Number] | None = Field(None, description='Dense and pruned; "Infinity" is a value.')
    speed: tuple[Number, Number] | None = Field(None, description="Generated tokens per second, dense and pruned.")
    retention: Number | None = Field(
        None, description="Mean over the tasks of pruned / dense, or of dense / pruned where lower is better."
    )
    interval: tuple[Number, Number] | None = Field(None, description="Of the retention.")
    confidence: float | None = Field(None, description="Of the interval, such as 0.95.")
    gate_passed: bool | None = None
    gate_verdict: Verdict | None = Field(None, description="Of the gate; null: the recipe has none.")


class JobRequest(_Value):
    """What a submission says beside its recipe."""

    name: str = Field(max_length=120)
    launcher: str = "local"
    gpus: int = Field(0, ge=0, le=1024)
    priority: int = Field(0, ge=-100, le=100)
    time_limit: float | None = Field(None, gt=0)
    source: str | None = None
    push: Hub | None = None
    shared: bool = False

    def columns(self) -> dict[str, Any]:
        """The request as the table keeps it."""
        return self.model_dump() | {"push": self.push.model_dump_json() if self.push else None}


@dataclass(frozen=True)
class NewJob:
    """A job that is to be queued. ``key`` and ``digest``: its idempotency key, and what that key stands for."""

    owner: str
    model: str
    recipe: str
    overrides: Sequence[str]
    request: JobRequest
    key: str | None = None
    digest: str = ""


class JobSummary(_Value):
    """A job as lists show it."""

    id: str
    name: str
    owner: str
    model: str
    state: State
    step: str | None = Field(description="What it does now.")
    done: int | None = Field(description="Layers of the step that are done.")
    total: int | None
    fraction: float = Field(description="Of the whole run that is done, roughly.")
    seconds_left: float | None = Field(description="Of the step.")
    launcher: str
    gpus: int
    devices: tuple[str, ...]
    priority: int
    time_limit: float | None = Field(description="Seconds that it may run.")
    attempts: int
    ran_seconds: float = Field(description="How long it has run, over all attempts.")
    ran_before: float = Field(description="What of ran_seconds was before the last retry: the limit leaves it out.")
    exit_code: int | None
    error: str | None
    figures: Figures | None
    shared: bool = Field(description="Whether everybody with a token may read it; else its owner and admins.")
    cleaned: bool = Field(description="Whether the clean-up has taken its model.")
    source: str | None = Field(description="The job whose model it pushes to the hub; null: it prunes.")
    published: Published | None = Field(description="Where it has pushed the model to.")
    reevaluate: int | None = Field(
        description="Samples a task that its finished model is evaluated on; null: its recipe is run."
    )
    created: float = Field(description="Seconds since 1970, as are started and finished.")
    started: float | None
    finished: float | None

    _unreadable: tuple[str, ...] = PrivateAttr(())

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless somebody retries it."""
        return self.state in ENDED

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Columns whose stored values cannot be read; the fields hold neutral values."""
        return self._unreadable

    @property
    def retry_helps(self) -> bool:
        """Whether the same job may end otherwise: it was stopped, or failed for a reason other than its recipe.

        A recipe that has made a model is not what is wrong where the evaluation of more samples fails.
        """
        recipe_is_wrong = self.exit_code == RECIPE_IS_WRONG and self.reevaluate is None
        return self.state == "cancelled" or (self.state == "failed" and not recipe_is_wrong)


class Job(JobSummary):
    """A job with its recipe."""

    seq: int = Field(description="Its place in the order of arrival.")
    recipe: str
    overrides: tuple[str, ...]
    push: Hub | None = Field(description="How it pushes; null: it prunes.")


RECIPE_IS_WRONG = 2  # llmprune's exit code for a recipe that cannot be run as it is
SUMMARY_COLUMNS = ", ".join(JobSummary.model_fields)
_JSON_COLUMNS = ("devices", "figures", "published", "overrides", "push")
# Shown in place of a value that cannot be read; None for all others.
_NEUTRAL: dict[str, Any] = {
    "name": "?", "owner": "", "model": "?", "state": "failed", "fraction": 0.0, "launcher": "?", "gpus": 0,
    "devices": (), "priority": 0, "attempts": 0, "ran_seconds": 0.0, "shared": False, "cleaned": False,
    "created": 0.0, "seq": 0, "recipe": "", "overrides": (),
}  # fmt: skip

J = TypeVar("J", bound=JobSummary)


def summary_of(row: sqlite3.Row) -> JobSummary:
    """A row with ``SUMMARY_COLUMNS`` as a value. A column that cannot be read becomes a neutral value."""
    return _value_of(JobSummary, row)


def job_of(row: sqlite3.Row) -> Job:
    """A whole row as a value. A column that cannot be read becomes a neutral value."""
    return _value_of(Job, row)


def _value_of(kind: type[J], row: sqlite3.Row) -> J:
    fields = {name: row[name] for name in kind.model_fields}
    unreadable: set[str] = set()
    for name in _JSON_COLUMNS:
        if fields.get(name) is not None:
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, TypeError, RecursionError):
                unreadable.add(name)
    fields |= {name: _NEUTRAL.get(name) for name in unreadable}
    try:
        found = kind(**fields)
    except ValidationError as error:
        wrong = {str(problem["loc"][0]) for problem in error.errors(include_url=False, include_input=False)}
        unreadable |= wrong
        found = kind(**fields | {name: _NEUTRAL.get(name) for name in wrong})
    found._unreadable = tuple(sorted(unreadable))
    return found
