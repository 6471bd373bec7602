"""Values in the answers of the API that are not in the job table. The Python client reads them too: no FastAPI here."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from llmprune.service.jobs.job import Figures, JobSummary, State
from llmprune.service.jobs.library.models import Model, Stage


class JobPage(BaseModel):
    """A page of jobs, the newest first."""

    jobs: list[JobSummary]
    next: int | None = Field(description="Value of before for the next page; null: this is the last page.")
    counts: dict[State, int] = Field(description="Number of jobs that the caller may read, by state.")


class Offered(BaseModel):
    """A kind of follow-up, and whether the job can have one."""

    kind: Literal["evaluate", "bench", "size", "recover", "sparsify", "repeat"]
    reason: str | None = Field(description="Why the job cannot have one; null: it can.")


class FollowUps(BaseModel):
    """Follow-ups that a job can have, and those that the caller may read, the newest first."""

    offers: list[Offered]
    jobs: list[JobSummary]


class Compared(BaseModel):
    """One job of a comparison."""

    id: str
    name: str
    owner: str
    model: str
    state: State
    stage: Stage | None = Field(description="Stage in the model library; null: the job has no result.")
    tags: tuple[str, ...]
    figures: Figures | None = Field(description="Figures of the report; null: the job has none.")
    disk: int | None = Field(description="Bytes of the saved model on disk; null: it is not there.")


class RecipeDifference(BaseModel):
    """A key of the recipes whose values differ."""

    key: str
    values: list[str | None] = Field(description="Value in each job's recipe, in their order; null: none.")


class Comparison(BaseModel):
    """Jobs next to each other."""

    jobs: list[Compared]
    warnings: list[str] = Field(description="One sentence for each reason why the figures are hard to compare.")
    recipe: list[RecipeDifference] = Field(description="Keys whose values differ between the recipes that were run.")


class ModelList(BaseModel):
    """A page of the model library."""

    models: list[Model]
    next: str | None = Field(description="Value of after for the next page; null: this is the last page.")


class DeletedModels(BaseModel):
    """Answer to the deletion of several models."""

    deleted: int = Field(description="Number of jobs that were deleted with their files.")


class CancelledSweep(BaseModel):
    """Answer to the cancellation of a sweep."""

    cancelled: int = Field(description="Number of its jobs that were waiting or running.")


class JobEvent(BaseModel):
    """A change of a job, as its event stream sends it."""

    model_config = ConfigDict(allow_inf_nan=False)

    id: str = Field(description="The job's id.")
    state: State
    step: str | None = None
    done: int | None = None
    total: int | None = None
    detail: str | None = None
    fraction: float
    seconds_left: float | None = None
    run_seconds_left: float | None = None
    attempts: int = 0
    exit_code: int | None = None
    error: str | None = None


class Artifact(BaseModel):
    """A file of a run folder."""

    name: str = Field(description="Path in the run folder.")
    bytes: int = Field(description="Size in bytes.")


class Validation(BaseModel):
    """Result of the check of a recipe's schema and of the service's policy.

    Model, text and tasks are not checked; the plan reports their problems.
    """

    valid: bool
    problems: list[str] = Field(description="One sentence for each mistake.")


class Health(BaseModel):
    """State and version of the service."""

    status: str
    version: str


class Device(BaseModel):
    """A GPU of this machine."""

    name: str
    busy: bool = Field(description="A job holds it.")
    job: str | None = Field(description="Id of the job that holds it; null if the caller may not read it.")


class Queue(BaseModel):
    """Jobs by state, slots, devices and launchers of the service."""

    counts: dict[State, int] = Field(description="Number of jobs that the caller may read, by state.")
    slots: int = Field(description="Jobs without a GPU that may run at a time.")
    slots_used: int
    devices: list[Device]
    launchers: list[str] = Field(description="Launchers that jobs may ask for.")
    supervisor_alive: bool = Field(description="False: jobs do not start until the supervisor has been restarted.")
    disk_quota_reached: bool = Field(description="True: waiting jobs do not start.")
