"""Task results as tables for the terminal: of one model, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from llmprune.results.figures.evaluation import RetentionFigures, TaskFigures
from llmprune.results.formatting import fixed, interval_name, metric_name, number, percent, probability, span


def table_of_one(results: Any) -> Table:
    """Return the table of one model's ``TaskResults``."""
    table = _table("task", "metric", "value", "samples")
    for task in results.tasks:
        table.add_row(task.task, task.metric, f"{task.value:.4f}", str(len(task.samples)))
    return table


def table_of_two(
    tasks: Sequence[TaskFigures], groups: Sequence[TaskFigures], *, mean: RetentionFigures | None
) -> Table:
    """Return the table of both models: tasks, then groups, then the mean retention."""
    interval = interval_name(task.interval for task in tasks)
    table = _table("task", "metric", "base", "model", "retention", interval, "lost", "gained", "p")
    for task in tasks:
        _add(table, task)
    for group in groups:
        _add(table, group, style="italic")
    if mean is not None:
        table.add_row("mean", "", "", "", percent(mean.retention), span(mean.interval), style="bold")
    return table


def _add(table: Table, task: TaskFigures, *, style: str | None = None) -> None:
    table.add_row(
        task.task,
        f"{metric_name(task)} ({task.samples:,})",
        fixed(task.dense),
        fixed(task.pruned),
        percent(task.retention),
        span(task.interval),
        number(task.lost),
        number(task.gained),
        probability(task.p_value),
        style=style,
    )


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, head in enumerate(heads):
        table.add_column(head, justify="left" if column < 2 else "right", overflow="fold")
    return table
