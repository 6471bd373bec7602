"""Comparison of several runs as one HTML page: size against retention, and a table. No network, no script."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.report.html.interval_charts import Dot, size_chart
from llmprune.report.html.page import environment
from llmprune.report.runs import Run, differences_of, has_trained, mean_interval, relative_size, warnings_of


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page as text."""
    plotted = [run for run in runs if run.report.mean_retention is not None]
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=[(plotted.index(run) + 1 if run in plotted else None, run, relative_size(run)) for run in runs],
            chart=size_chart(retention_dots(runs)),
            warnings=warnings_of(runs),
            differences=differences_of(runs),
            interval=mean_interval(runs),
            trained=has_trained(runs),
            tiles=[],
        )
    )


def retention_dots(runs: Sequence[Run]) -> list[Dot]:
    """Return size and mean retention of the runs that have one, in their order."""
    return [_dot(run) for run in runs if run.report.mean_retention is not None]


def _dot(run: Run) -> Dot:
    mean = run.report.retention
    low, high = (mean.interval.low, mean.interval.high) if mean else (None, None)
    return Dot(run.name, relative_size(run), run.report.mean_retention or 0.0, low, high)
