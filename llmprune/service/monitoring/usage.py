"""Use of the machine by a job: samples of its processes, GPUs and files, kept in the job's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

USAGE = "usage.json"
_MOST_SAMPLES = 240  # then every second one is dropped and samples are taken half as often
_MOST_BYTES = 1_000_000


class GpuUse(BaseModel):
    """Use of one GPU, by this job and by whatever else runs on it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str = Field(max_length=100, description="Number of the GPU, or its UUID.")
    percent: float | None = Field(ge=0, le=100, description="Fraction of the time in which it computed, in percent.")
    memory: int | None = Field(ge=0, description="Bytes of its memory in use.")
    total: int | None = Field(ge=0, description="Bytes of its memory.")


class UsageSample(BaseModel):
    """Use of the machine at one moment."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    at: float = Field(ge=0, description="Seconds since 1970.")
    cpu: float | None = Field(ge=0, description="Use of the processors in percent; 200: two of them.")
    memory: int | None = Field(ge=0, description="Bytes of anonymous memory of all its processes.")
    disk: int | None = Field(ge=0, description="Bytes of the job's folder on disk; null: not measured this time.")
    gpus: tuple[GpuUse, ...] = Field((), max_length=64)


class JobUsage(BaseModel):
    """Use of the machine by a job, and its limits."""

    model_config = ConfigDict(frozen=True)

    every: float = Field(5.0, gt=0, description="Seconds between two samples.")
    samples: tuple[UsageSample, ...] = Field((), max_length=2 * _MOST_SAMPLES, description="The oldest first.")

    def with_sample(self, sample: UsageSample) -> JobUsage:
        """Return the usage with one more sample; where there are too many, every second one is dropped."""
        samples = (*self.samples, sample)
        if len(samples) <= _MOST_SAMPLES:
            return self.model_copy(update={"samples": samples})
        return self.model_copy(update={"samples": samples[1::2], "every": 2 * self.every})


class JobUse(BaseModel):
    """Use of the machine by a job, and its limits."""

    every: float = Field(description="Seconds between two samples.")
    samples: list[UsageSample] = Field(description="The oldest first; empty: nothing was measured.")
    memory_limit: int | None = Field(description="Bytes of memory above which the job is ended; null: no limit.")
    disk_quota: int | None = Field(description="Bytes that all jobs of the service may take together; null: no quota.")


def read_usage(folder: Path) -> JobUsage:
    """Return the usage of the job in a folder; empty where there is none or it cannot be read."""
    try:
        with (folder / USAGE).open("rb") as file:
            return JobUsage.model_validate_json(file.read(_MOST_BYTES))
    except (OSError, ValidationError):
        return JobUsage()


def write_usage(folder: Path, usage: JobUsage) -> None:
    """Write the usage of a job beside the old one, then in its place. Raises OSError."""
    partial = folder / f"{USAGE}.partial"
    partial.write_text(json.dumps(usage.model_dump(mode="json")), encoding="utf-8")
    os.replace(partial, folder / USAGE)
