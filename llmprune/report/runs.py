"""Finished runs that are compared: their names, their figures as JSON data, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.common.errors import OutputError
from llmprune.results.comparison import ComparedRun, Difference, comparison_warnings, recipe_differences
from llmprune.results.formatting import interval_name, plural, share
from llmprune.results.load_report import load_report
from llmprune.results.report_schema import Report


@dataclass(frozen=True)
class Run:
    """Report of a run and the name that identifies it among others."""

    name: str
    report: Report


def load_runs(folders: Sequence[Path]) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Return the runs of several folders, and a sentence for each folder without a readable report.

    A run's name is the end of its path, as many parts as make all names unique. Raises OutputError if a path does not
    exist, a run is named twice, or fewer than two of several folders have a report.
    """
    reports: dict[Path, Report] = {}
    skipped = []
    for folder in folders:
        if not folder.exists():
            raise OutputError(f"{folder} does not exist; give folders of finished runs")
        home = (folder if folder.is_dir() else folder.parent).resolve()
        if home in reports:
            raise OutputError(f"the run {folder} is named twice; name each once")
        try:
            reports[home] = load_report(folder)
        except OutputError as error:
            skipped.append(str(error))
    if len(reports) < min(2, len(folders)):
        several = len(folders) > 1
        found = f"{plural(len(reports), 'finished run')} in {len(folders)} folders; " if several else ""
        raise OutputError(found + "; ".join(skipped))
    parts = [home.parts for home in reports]
    depth = next(
        depth for depth in range(1, 1 + max(map(len, parts))) if len({part[-depth:] for part in parts}) == len(parts)
    )
    runs = tuple(Run("/".join(part[-depth:]), report) for part, report in zip(parts, reports.values(), strict=True))
    return runs, tuple(skipped)


def warnings_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return a sentence for each difference that makes the runs' figures hard to compare."""
    return comparison_warnings([ComparedRun.model_validate(run.report) for run in runs])


def differences_of(runs: Sequence[Run]) -> list[Difference]:
    """Return the keys of the recipes whose values differ between the runs."""
    return recipe_differences([run.report.recipe for run in runs])


def mean_interval(runs: Sequence[Run]) -> str:
    """Return the name of the mean retention's interval, such as ``95% interval``."""
    return interval_name(run.report.retention.interval for run in runs if run.report.retention)


def has_trained(runs: Sequence[Run]) -> bool:
    """Check that any of the models was trained after the cut."""
    return any(run.report.recovery is not None for run in runs)


def figures_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the compared figures as JSON data, a mapping for each run."""
    return [
        {
            "run": run.name,
            "size": relative_size(run),
            "parameters": run.report.pruned.parameters,
            "trained_tokens": run.report.trained_tokens or 0,
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


def relative_size(run: Run) -> float:
    """Return the share of the dense model's bytes."""
    return share(run.report.dense.bytes, run.report.pruned.bytes) or 0.0
