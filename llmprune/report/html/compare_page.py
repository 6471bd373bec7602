"""Comparison of several runs as one HTML page: size against retention, and a table. No network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmprune.report.html.interval_charts import Dot, size_chart
from llmprune.report.html.page import environment
from llmprune.report.runs import Run, differences_of, has_trained, mean_interval, warnings_of
from llmprune.results.formatting import share


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page as text."""
    plotted = [run for run in runs if run.report.mean_retention is not None]
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=[(plotted.index(run) + 1 if run in plotted else None, run, _relative_size(run)) for run in runs],
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


def figures_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the compared figures as JSON data, a mapping for each run."""
    return [
        {
            "run": run.name,
            "size": _relative_size(run),
            "parameters": run.report.pruned.parameters,
            "trained_tokens": run.report.recovery.tokens if run.report.recovery else 0,
            "retention": run.report.retention.model_dump(mode="json") if run.report.retention else None,
            "perplexity": run.report.perplexity.model_dump(mode="json") if run.report.perplexity else None,
            "greedy_agreement": _greedy_agreement(run),
            "speed": run.report.speed.model_dump(mode="json") if run.report.speed else None,
            "verdict": run.report.gate.verdict if run.report.gate else None,
        }
        for run in runs
    ]


def _greedy_agreement(run: Run) -> dict[str, Any] | None:
    generation = run.report.generation
    found = generation.agreement if generation else None
    return found.model_dump(mode="json") if found else None


def _relative_size(run: Run) -> float:
    """Return the share of the dense model's bytes."""
    return share(run.report.dense.bytes, run.report.pruned.bytes) or 0.0


def _dot(run: Run) -> Dot:
    mean = run.report.retention
    low, high = (mean.interval.low, mean.interval.high) if mean else (None, None)
    return Dot(run.name, _relative_size(run), run.report.mean_retention or 0.0, low, high)
