"""A job: one recipe, from its submission to its result.

queued ──▶ running ──▶ succeeded, gate_not_met, gate_undecided   (the model is finished)
  ▲  │        │  └───▶ failed ──▶ queued   (retry: continues the run folder)
  │  ▼        ▼
  │ cancelled ◀── cancelling
  └────┘

A finished job is queued again to evaluate more samples of its model (``reevaluate``).
A job with a ``source`` is a push: it sends the finished model of that job to the hub.
A job with ``work`` is a follow-up of the job ``made_from``.
A job of a sweep may begin with the scores of another one, which is its ``reads`` from its start on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, WithJsonSchema

from llmprune.publish.published import Published
from llmprune.recipe.hub import Hub
from llmprune.results.figures.evaluation import Verdict
from llmprune.service.artifacts.parts import Part, Use
from llmprune.service.database.database import Row
from llmprune.service.jobs.follow_ups.work import Work
from llmprune.service.notifications.targets import StoredTarget

State = Literal["queued", "running", "cancelling", "cancelled", "failed", "gate_not_met", "gate_undecided", "succeeded"]
ACTIVE: tuple[State, ...] = ("running", "cancelling")
FINISHED: tuple[State, ...] = ("gate_not_met", "gate_undecided", "succeeded")  # with a verified model
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
BY_TASK = 0  # samples of an evaluation in which each task has a limit of its own, as many as the gate needs


class Value(BaseModel):
    """A value that does not change and knows all of its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figures(Value):
    """Figures of a job's report, for lists and comparisons."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    parameters: tuple[int, int] = Field(description="Number of parameters, dense and pruned.")
    bytes: tuple[int, int] = Field(description="Bytes of the weights, dense and pruned.")
    layers: tuple[int, int] = Field(description="Number of decoder layers, dense and pruned.")
    perplexity: tuple[Number, Number] | None = Field(
        None, description='Perplexity, dense and pruned; may be "Infinity".'
    )
    speed: tuple[Number, Number] | None = Field(None, description="Generated tokens per second, dense and pruned.")
    kv_cache: tuple[int, int] | None = Field(
        None, description="Bytes of the key-value cache of one token, dense and pruned."
    )
    retention: Number | None = Field(
        None, description="Mean over the tasks of pruned / dense, or of dense / pruned where lower is better."
    )
    interval: tuple[Number, Number] | None = Field(None, description="Confidence interval of the retention.")
    confidence: float | None = Field(None, description="Confidence level of the interval, such as 0.95.")
    gate_passed: bool | None = None
    gate_verdict: Verdict | None = Field(None, description="Verdict of the gate; null: the recipe has none.")


def figures_of(report: Mapping[str, Any]) -> Figures:
    """Return the figures of a report's JSON data. Raises KeyError, TypeError, AttributeError and ValueError."""
    dense, pruned, perplexity, speed = (report[name] for name in ("dense", "pruned", "perplexity", "speed"))
    interval = report["retention"]["interval"] if report.get("retention") else None
    gate, cache = report["gate"], (dense.get("kv_bytes_per_token"), pruned.get("kv_bytes_per_token"))
    return Figures(
        parameters=(dense["parameters"], pruned["parameters"]),
        bytes=(dense["bytes"], pruned["bytes"]),
        layers=(dense["layers"], pruned["layers"]),
        perplexity=(perplexity["dense"], perplexity["pruned"]) if perplexity else None,
        speed=(speed["dense"], speed["pruned"]) if speed else None,
        kv_cache=None if None in cache else cache,
        retention=report["mean_retention"],
        interval=(interval["low"], interval["high"]) if interval else None,
        confidence=interval["confidence"] if interval else None,
        gate_passed=gate["passed"] if gate else None,
        gate_verdict=gate["verdict"] if gate else None,
    )


class JobRequest(Value):
    """Settings of a submission other than its recipe."""

    name: str = Field(max_length=120)
    launcher: str = "local"
    gpus: int = Field(0, ge=0, le=1024)
    priority: int = Field(0, ge=-100, le=100)
    time_limit: float | None = Field(None, gt=0)
    source: str | None = None
    push: Hub | None = None
    shared: bool = False
    made_from: str | None = None
    work: Work | None = None

    def columns(self) -> dict[str, Any]:
        """Return the request as columns of the job table."""
        values = {name: getattr(self, name) for name in ("push", "work")}
        return self.model_dump() | {name: value and value.model_dump_json() for name, value in values.items()}


@dataclass(frozen=True)
class NewJob:
    """A job to be queued. ``key`` is its idempotency key, ``digest`` that of the submission made with the key.

    ``notify``: targets that are told when it ends; None: those that its owner has set for such jobs.
    """

    owner: str
    model: str
    recipe: str
    overrides: Sequence[str]
    request: JobRequest
    key: str | None = None
    digest: str = ""
    notify: tuple[StoredTarget, ...] | None = None
    uses: tuple[Use, ...] = ()  # files of other jobs that it needs
    scores: str | None = None  # equal for jobs that need the same scores; see shared_scores.py


@dataclass(frozen=True)
class JobQuery:
    """Selection of jobs for a list, the newest first."""

    viewer: str | None  # only the jobs of this owner and shared ones; None: all jobs
    states: Sequence[State] = ()  # empty: every state
    owner: str | None = None
    search: str | None = None  # part of the name or model, or an id
    source: str | None = None  # only pushes of this job's model
    ids: Sequence[str] = ()  # only these jobs; empty: all
    made_from: str | None = None  # only follow-ups of this job
    before: int | None = None  # only jobs that arrived before this one; see Job.seq
    limit: int = 50


@dataclass(frozen=True)
class Outcome:
    """End of an attempt: the job's state from then on, and the columns that are written with it."""

    state: State
    exit_code: int | None = None
    error: str | None = None
    results: Mapping[str, str | None] = field(default_factory=dict)  # columns ``figures`` and ``published``, as JSON


class JobSummary(Value):
    """A job as lists show it."""

    id: str
    name: str
    owner: str
    model: str
    state: State
    step: str | None = Field(description="Current step of the run.")
    done: int | None = Field(description="Layers, or steps of a training, that the step has finished.")
    total: int | None = Field(description="Layers, or steps of a training, in all.")
    detail: str | None = Field(None, description="How a training stands: tokens, loss, held-out divergence.")
    fraction: float = Field(description="Fraction of the whole run that is done, roughly.")
    seconds_left: float | None = Field(description="Estimated seconds left in the step.")
    run_seconds_left: float | None = Field(
        description="Estimated seconds left of the whole run; null: unknown, as before a step has shown the speed "
        "or before the tasks of the evaluation end."
    )
    launcher: str
    gpus: int
    devices: tuple[str, ...]
    priority: int
    time_limit: float | None = Field(description="Maximum run time in seconds; null: no limit.")
    attempts: int
    ran_seconds: float = Field(description="Run time of all attempts in seconds.")
    ran_before: float = Field(description="Part of ran_seconds before the last retry, which the limit does not count.")
    exit_code: int | None
    error: str | None
    figures: Figures | None
    shared: bool = Field(description="Every user with a token may read it; otherwise its owner and admins.")
    cleaned: bool = Field(description="The clean-up has deleted its model.")
    uploaded: bool = Field(False, description="A user uploaded its run folder; the service did not make it.")
    source: str | None = Field(description="Id of the job whose model it pushes to the hub; null: it is no push.")
    published: Published | None = Field(description="The commit that the push made on the hub.")
    made_from: str | None = Field(description="Id of the job that it is a follow-up of; null: of none.")
    reevaluate: int | None = Field(
        description="Samples for each task in the evaluation of more samples; 0: as many as the gate needs, in "
        "proportion to the limits of each task; null: it runs its recipe."
    )
    created: float = Field(description="Seconds since 1970, as are started and finished.")
    started: float | None
    finished: float | None

    _unreadable: tuple[str, ...] = PrivateAttr(())

    @property
    def ended(self) -> bool:
        """True where the job changes no more unless it is retried or evaluated again."""
        return self.state in ENDED

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Columns whose stored values cannot be read; their fields hold neutral values."""
        return self._unreadable

    @property
    def retry_helps(self) -> bool:
        """True where a retry may succeed: the job was cancelled, or failed for a reason other than its recipe.

        A failed evaluation of more samples is never due to the recipe, which has produced a model already.
        """
        recipe_is_wrong = self.exit_code == RECIPE_IS_WRONG and self.reevaluate is None
        return self.state == "cancelled" or (self.state == "failed" and not recipe_is_wrong)


class Job(JobSummary):
    """A job with its recipe."""

    seq: int = Field(description="Position in the order of arrival.")
    recipe: str
    overrides: tuple[str, ...]
    push: Hub | None = Field(description="Settings of the push; null: it is no push.")
    reads: str | None = Field(description="Id of the job whose run folder it reads; null: of none.")
    base: str | None = Field(None, description="Id of the job whose model it starts from; null: of none.")
    work: Work | None = Field(description="Kind of work of a follow-up, and its settings; null: it is none.")

    @property
    def uses(self) -> tuple[Use, ...]:
        """Files of other jobs that it needs until it has ended."""
        own: Part = "scores" if self.source is None else "run"  # a job of a sweep takes scores, a push sends a run
        part = own if self.work is None else self.work.needs
        read = () if self.reads is None or part is None else (Use(self.reads, part),)
        return read if self.base is None else (*read, Use(self.base, "model"))


RECIPE_IS_WRONG = 2  # llmprune's exit code for a recipe that cannot be run as it is
SUMMARY_COLUMNS = ", ".join(JobSummary.model_fields)
_USED = "(SELECT used FROM uses WHERE uses.job = jobs.id AND part {} 'model' LIMIT 1)"
JOB_COLUMNS = f"jobs.*, {_USED.format('<>')} AS reads, {_USED.format('=')} AS base"  # of a row for job_of
_JSON_COLUMNS = ("devices", "figures", "published", "overrides", "push", "work")
# Values of columns that cannot be read; None for all others.
_NEUTRAL: dict[str, Any] = {
    "name": "?", "owner": "", "model": "?", "state": "failed", "fraction": 0.0, "launcher": "?", "gpus": 0,
    "devices": (), "priority": 0, "attempts": 0, "ran_seconds": 0.0, "shared": False, "cleaned": False,
    "uploaded": False, "created": 0.0, "seq": 0, "recipe": "", "overrides": (),
}  # fmt: skip

J = TypeVar("J", bound=JobSummary)


@dataclass(frozen=True)
class JobPage:
    """A page of a job list. ``next`` is the query's ``before`` for the next page; None: this is the last."""

    jobs: list[JobSummary]
    next: int | None


def summary_of(row: Row) -> JobSummary:
    """Convert a row with ``SUMMARY_COLUMNS``. A column that cannot be read becomes a neutral value."""
    return _value_of(JobSummary, row)


def job_of(row: Row) -> Job:
    """Convert a row with ``JOB_COLUMNS``. A column that cannot be read becomes a neutral value."""
    return _value_of(Job, row)


def _value_of(kind: type[J], row: Row) -> J:
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
