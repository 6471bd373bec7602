"""Results side by side: how small against how good. The chart is that of ``llmprune compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.report.html.interval_charts import Dot, size_chart
from llmprune.results.formatting import interval_heading
from llmprune.service.jobs.job import Figures, JobSummary

Measure = Callable[[Figures], tuple[float, float | None, float | None] | None]


@dataclass(frozen=True)
class Comparison:
    """Some jobs, and which of them the chart shows under which number."""

    jobs: Sequence[JobSummary]
    numbers: dict[str, int]  # by job
    chart: Markup | None
    by_tasks: bool  # else by perplexity
    interval: str  # what the lines are, such as 95% interval


def compared(jobs: Sequence[JobSummary]) -> Comparison:
    """The jobs on one measure: the mean retention over tasks if any job has it, else the perplexity that was kept.

    Never both in one chart: a share of task scores and a share of perplexity are different things.
    """
    by_tasks = any(job.figures and job.figures.retention is not None for job in jobs)
    measure = _retention if by_tasks else _perplexity
    dots = {job.id: dot for job in jobs if (dot := _dot(job, measure))}
    numbers = {job: number for number, job in enumerate(dots, start=1)}
    confidences = (job.figures.confidence for job in jobs if job.figures and job.figures.confidence is not None)
    return Comparison(jobs, numbers, size_chart(list(dots.values())), by_tasks, interval_heading(confidences))


def _dot(job: JobSummary, measure: Measure) -> Dot | None:
    kept = measure(job.figures) if job.figures else None
    if job.figures is None or kept is None or not job.figures.bytes[0]:
        return None
    return Dot(job.name, job.figures.bytes[1] / job.figures.bytes[0], *kept)


def _retention(figures: Figures) -> tuple[float, float | None, float | None] | None:
    low, high = figures.interval or (None, None)
    return None if figures.retention is None else (figures.retention, low, high)


def _perplexity(figures: Figures) -> tuple[float, float | None, float | None] | None:
    dense, pruned = figures.perplexity or (0.0, 0.0)
    return (dense / pruned, None, None) if pruned else None  # what is not finite then has no place in the chart
