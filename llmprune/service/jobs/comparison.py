"""Comparison of jobs by their reports: warnings, differences of the recipes, and figures as CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llmprune.results.comparison import ComparedRun, Difference, comparison_warnings, recipe_differences
from llmprune.service.jobs.job import Figures, JobSummary
from llmprune.service.jobs.library.models import Model
from llmprune.service.settings import Settings

MOST_COMPARED = 50  # jobs
_MOST_NAMED = 3  # jobs in a warning
_MAX_REPORT = 50_000_000  # bytes of a report.json that is read
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a text that begins so for a formula
_COLUMNS = (
    "id", "name", "base model", "owner", "state", "stage", "tags", "notes", "finished (seconds since 1970)",
    "parameters dense", "parameters pruned", "weights dense (bytes)", "weights pruned (bytes)",
    "model on disk (bytes)", "layers dense", "layers pruned", "key-value cache dense (bytes/token)",
    "key-value cache pruned (bytes/token)", "retention (1 = dense)", "interval low", "interval high",
    "confidence level", "perplexity dense", "perplexity pruned", "speed dense (tokens/s)",
    "speed pruned (tokens/s)", "gate", "run time (s)",
)  # fmt: skip


@dataclass(frozen=True)
class ComparedJobs:
    """Warnings about jobs, and the differences of their recipes, which have a value for each job in order."""

    warnings: tuple[str, ...]
    differences: list[Difference]


def compare_reports(jobs: Sequence[JobSummary], settings: Settings) -> ComparedJobs:
    """Compare the reports of jobs. A job without a readable report is named in a warning if others have one."""
    runs = [_report_of(job.id, settings) if job.figures else None for job in jobs]
    known = [run for run in runs if run is not None]
    unread = [job.name for job, run in zip(jobs, runs, strict=True) if job.figures and run is None]
    warnings = list(comparison_warnings(known))
    if unread and len(jobs) > 1:
        named = ", ".join(unread[:_MOST_NAMED]) + (", …" if len(unread) > _MOST_NAMED else "")
        warnings.append(f"settings and recipes are not compared for {named}, because the reports cannot be read")
    return ComparedJobs(tuple(warnings), recipe_differences([run.recipe if run else None for run in runs]))


def bytes_on_disk(job: str, settings: Settings) -> int | None:
    """Return the bytes of a job's saved model, tokenizer and all; None where it is not there."""
    try:
        with os.scandir(settings.run_folder(job) / "model") as files:
            return sum(file.stat().st_size for file in files if file.is_file(follow_symlinks=False)) or None
    except OSError:
        return None


def as_csv(jobs: Sequence[JobSummary], models: dict[str, Model], *, settings: Settings) -> str:
    """Return all figures of jobs as CSV, a line for each job. Texts that a spreadsheet would run are quoted."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for job in jobs:
        writer.writerow(
            [_cell(value) for value in _values(job, models.get(job.id), on_disk=bytes_on_disk(job.id, settings))]
        )
    return text.getvalue()


def _report_of(job: str, settings: Settings) -> ComparedRun | None:
    """Read the compared part of a job's report; None where it cannot be read."""
    path = settings.run_folder(job) / "report.json"
    try:
        if path.stat().st_size > _MAX_REPORT:
            return None
        return ComparedRun.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError, RecursionError):
        return None


def _values(job: JobSummary, model: Model | None, *, on_disk: int | None) -> list[Any]:
    """Return the values of ``_COLUMNS``; None for a figure that there is not."""
    labels = [model.stage, " ".join(model.tags), model.notes] if model else [None, None, None]
    return [
        *(job.id, job.name, job.model, job.owner, job.state, *labels, job.finished),
        *(_figures(job.figures, on_disk) if job.figures else [None] * 17),
        job.figures.gate_verdict if job.figures else None,
        round(job.ran_seconds, 1),
    ]


def _figures(figures: Figures, on_disk: int | None) -> list[Any]:
    nothing = (None, None)
    return [
        *(*figures.parameters, *figures.bytes, on_disk, *figures.layers, *(figures.kv_cache or nothing)),
        *(figures.retention, *(figures.interval or nothing), figures.confidence),
        *(*(figures.perplexity or nothing), *(figures.speed or nothing)),
    ]


def _cell(value: Any) -> Any:
    """Return a value as a cell: a text that begins like a formula gets an apostrophe, which spreadsheets hide."""
    if not isinstance(value, str):
        return value
    return f"'{value}" if value.lstrip(" \n").startswith(_FORMULA) or value.startswith(_FORMULA) else value
