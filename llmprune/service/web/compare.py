"""Comparison of jobs: size against quality. The chart is that of ``llmprune compare``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from llmprune.report.html.interval_charts import Dot, size_chart
from llmprune.results.formatting import interval_heading
from llmprune.service.jobs.comparison import ComparedJobs
from llmprune.service.jobs.job import Figures, JobSummary

_NOT_COMPARED = ComparedJobs((), [])


@dataclass(frozen=True)
class Quality:
    """Fraction of the dense model's quality that is retained, with its confidence interval where it has one."""

    retained: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Jobs to compare, and the number of each job in the chart."""

    jobs: Sequence[JobSummary]
    numbers: dict[str, int]  # by job id; jobs without a quality are not in the chart
    chart: Markup | None
    by_tasks: bool  # quality is the mean retention over tasks, otherwise that of the perplexity
    interval: str | None  # meaning of the chart's lines, such as 95% interval; None: it has none
    reports: ComparedJobs  # warnings, and differences of the recipes
    disk: Mapping[str, int | None] = field(default_factory=dict)  # bytes of the saved model, by job


def comparison_of(
    jobs: Sequence[JobSummary],
    reports: ComparedJobs = _NOT_COMPARED,
    *,
    disk: Mapping[str, int | None] | None = None,
) -> Comparison:
    """Compare jobs by their mean retention over tasks if any job has one, otherwise by the perplexity retained.

    The two are never in one chart: a ratio of task scores and a ratio of perplexities cannot be compared.
    """
    by_tasks = any(job.figures and job.figures.retention is not None for job in jobs)
    measure = _task_quality if by_tasks else _perplexity_quality
    dots = {job.id: dot for job in jobs if (dot := _dot(job, measure))}
    numbers = {job: number for number, job in enumerate(dots, start=1)}
    confidences = (job.figures.confidence for job in jobs if job.figures and job.figures.confidence is not None)
    has_lines = any(dot.low is not None for dot in dots.values())
    chart, interval = size_chart(list(dots.values())), interval_heading(confidences) if has_lines else None
    return Comparison(jobs, numbers, chart, by_tasks, interval, reports, disk or {})


def _dot(job: JobSummary, measure: Callable[[Figures], Quality | None]) -> Dot | None:
    quality = measure(job.figures) if job.figures else None
    if job.figures is None or quality is None or not job.figures.bytes[0]:
        return None
    size = job.figures.bytes[1] / job.figures.bytes[0]
    return Dot(job.name, size, quality.retained, quality.low, quality.high)


def _task_quality(figures: Figures) -> Quality | None:
    low, high = figures.interval or (None, None)
    return None if figures.retention is None else Quality(figures.retention, low, high)


def _perplexity_quality(figures: Figures) -> Quality | None:
    dense, pruned = figures.perplexity or (0.0, 0.0)
    return Quality(dense / pruned) if pruned else None  # the chart leaves out what is not finite
