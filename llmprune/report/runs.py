"""Comparison of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.common.errors import OutputError
from llmprune.results.comparison import ComparedRun, Difference, comparison_warnings, recipe_differences
from llmprune.results.formatting import (
    NOTHING,
    count,
    interval_name,
    number,
    percent,
    plural,
    share,
    span,
    speedup,
    times,
)
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


def print_runs(runs: Sequence[Run], console: Console) -> None:
    """Print one row per run: size, tokens trained on, retention, perplexity, speed, verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    trained = has_trained(runs)
    heads = (
        "run",
        "size",
        *(["trained on"] if trained else []),
        "retained",
        mean_interval(runs),
        "perplexity",
        "speed",
    )
    for head in (*heads, "gate"):
        table.add_column(head, justify="left" if head == "run" else "right", overflow="fold")
    for run in runs:
        report = run.report
        ratio = share(report.perplexity.dense, report.perplexity.pruned) if report.perplexity else None
        table.add_row(
            Text(run.name),
            percent(share(report.dense.bytes, report.pruned.bytes)),
            *([f"{count(report.trained_tokens)} tokens" if report.trained_tokens else NOTHING] if trained else []),
            percent(report.mean_retention),
            span(report.retention.interval if report.retention else None),
            f"{number(report.perplexity.pruned)} ({percent(ratio, 0)})" if report.perplexity else NOTHING,
            times(speedup(report.speed)) if report.speed else NOTHING,
            report.gate.verdict if report.gate else NOTHING,
        )
    console.print(table)
    _print_differences(runs, console)
    for warning in warnings_of(runs):
        console.print(Text.assemble(("Warning: ", "bold yellow"), warning))


def _print_differences(runs: Sequence[Run], console: Console) -> None:
    """Print the keys of the recipes that differ, a column for each run."""
    differences = differences_of(runs)
    if not differences:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("recipe", *(run.name for run in runs)):
        table.add_column(Text(head), overflow="fold")
    for one in differences:
        table.add_row(one.key, *(Text(value or NOTHING) for value in one.values))
    console.print(table)
