"""A job: one recipe on its way through the service.

queued ──▶ running ──▶ succeeded
  ▲  │        │  └───▶ failed ──▶ queued   (retry: continues the run folder)
  │  ▼        ▼
  │ cancelled ◀── cancelling
  └────┘

A job with a ``source`` is a push: it sends that job's finished model to the hub.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmprune.hub.published import Published
from llmprune.hub.section import Hub

State = Literal["queued", "running", "cancelling", "cancelled", "failed", "succeeded"]
ACTIVE: tuple[State, ...] = ("running", "cancelling")
ENDED: tuple[State, ...] = ("cancelled", "failed", "succeeded")
JOB_ID = "[0-9a-f]{12}"


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Value):
    """What a job's report says of its result, for lists and comparisons."""

    parameters: tuple[int, int] = Field(description="Dense and pruned.")
    bytes: tuple[int, int] = Field(description="Of the weights, dense and pruned.")
    layers: tuple[int, int]
    perplexity: tuple[float, float] | None = None
    speed: tuple[float, float] | None = Field(None, description="Generated tokens per second, dense and pruned.")
    retention: float | None = Field(
        None, description="Mean over the tasks of pruned / dense, or of dense / pruned where lower is better."
    )
    interval: tuple[float, float] | None = Field(None, description="Of the retention.")
    confidence: float | None = Field(None, description="Of the interval, such as 0.95.")
    gate_passed: bool | None = None


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
    created: float = Field(description="Seconds since 1970, as are started and finished.")
    started: float | None
    finished: float | None

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless somebody retries it."""
        return self.state in ENDED


class Job(JobSummary):
    """A job with its recipe."""

    seq: int = Field(description="Its place in the order of arrival.")
    recipe: str
    overrides: tuple[str, ...]
    push: Hub | None = Field(description="How it pushes; null: it prunes.")


SUMMARY_COLUMNS = ", ".join(JobSummary.model_fields)


def summary_of(row: sqlite3.Row) -> JobSummary:
    """A row of ``SUMMARY_COLUMNS`` as a value."""
    return JobSummary(**_fields(row))


def job_of(row: sqlite3.Row) -> Job:
    """A whole row as a value."""
    push = row["push"]
    return Job(**_fields(row) | {"overrides": json.loads(row["overrides"]), "push": json.loads(push) if push else None})


def _fields(row: sqlite3.Row) -> dict[str, Any]:
    fields = dict(row)
    figures, published = fields["figures"], fields["published"]
    return fields | {
        "devices": json.loads(fields["devices"]),
        "figures": json.loads(figures) if figures else None,
        "published": json.loads(published) if published else None,
        "cleaned": bool(fields["cleaned"]),
        "shared": bool(fields["shared"]),
    }
