"""Comparison of finished runs as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.report.runs import Run, differences_of, has_trained, mean_interval, warnings_of
from llmprune.results.formatting import NOTHING, count, number, percent, share, span, speedup, times


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
