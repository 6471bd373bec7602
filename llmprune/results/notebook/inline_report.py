"""Report as a compact HTML table for notebooks, without script and with every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from llmprune.common.printing import printable
from llmprune.results.figures.evaluation import (
    GateFigures,
    PerplexityFigures,
    RetentionFigures,
    SpeedFigures,
    TaskFigures,
)
from llmprune.results.figures.model_size import Size
from llmprune.results.formatting import change, metric_name, number, percent, plural, span, speedup
from llmprune.results.tables.sizes import size_rows

_CELL = "padding:.15em 1em .15em 0;text-align:{};border:0"
_VERDICTS = {"pass": "Gate passed", "fail": "Gate not passed"}
_MAX_TASKS = 20  # rows
Row = tuple[str, str, str, str]  # name of a figure; its dense and pruned value; change or retention


def inline_report(model: str, rows: Iterable[Row], *, gate: GateFigures | None, warnings: Iterable[str]) -> str:
    """Return the table of these rows under the name of the pruned model and the gate's verdict, and the warnings."""
    parts = [
        Markup('<div style="max-width:56em;font-family:system-ui,sans-serif"><p><strong>{}</strong>{}</p>').format(
            printable(model), _verdict(gate)
        ),
        _table(rows),
        *(Markup("<p>Warning: {}</p>").format(printable(warning)) for warning in warnings),
        Markup("</div>"),
    ]
    return str(Markup("").join(parts))


def _table(rows: Iterable[Row]) -> Markup:
    heads = ("", "dense", "pruned", "change or retention")
    lines = [_line("th", heads, row_head="td"), *(_line("td", row, row_head="th") for row in rows)]
    return Markup('<table style="border-collapse:collapse">{}</table>').format(Markup("").join(lines))


def _line(kind: str, cells: Row, *, row_head: str) -> Markup:
    made = [_cell(row_head, cells[0], side="left"), *(_cell(kind, text, side="right") for text in cells[1:])]
    return Markup("<tr>{}</tr>").format(Markup("").join(made))


def _cell(kind: str, text: str, *, side: str) -> Markup:
    style = _CELL.format(side)
    return Markup('<{kind} style="{style}">{text}</{kind}>').format(kind=kind, style=style, text=printable(text))


def _verdict(gate: GateFigures | None) -> str:
    return f" – {_VERDICTS.get(gate.verdict, 'Gate undecided')}" if gate else ""


def rows_of_sizes(dense: Size, pruned: Size) -> list[Row]:
    """Return the sizes of both models."""
    return [(row.label, row.dense, row.pruned, row.change) for row in size_rows(dense, pruned)]


def rows_of_quality(
    perplexity: PerplexityFigures | None,
    speed: SpeedFigures | None,
    *,
    mean: float | None,
    retention: RetentionFigures | None,
) -> list[Row]:
    """Return perplexity, speed and mean retention, as far as they were measured."""
    rows = []
    if perplexity:
        dense, pruned = perplexity.dense, perplexity.pruned
        rows.append(("perplexity", number(dense), number(pruned), change(dense, pruned)))
    if speed:
        dense, pruned = speed.dense, speed.pruned
        rows.append(("tokens per second", number(dense), number(pruned), f"{number(speedup(speed))}×"))
    if mean is not None:
        interval = f" ({span(retention.interval)})" if retention else ""
        rows.append(("mean retention", "", "", f"{percent(mean)}{interval}"))
    return rows


def rows_of_tasks(tasks: Sequence[TaskFigures]) -> list[Row]:
    """Return the scores of the first tasks, and the number of the others."""
    rows = []
    for task in tasks[:_MAX_TASKS]:
        interval = f" ({span(task.interval)})" if task.interval else ""
        name = f"{task.task}, {metric_name(task)}"
        rows.append((name, number(task.dense), number(task.pruned), f"{percent(task.retention)}{interval}"))
    left = len(tasks) - _MAX_TASKS
    return [*rows, (f"and {plural(left, 'more task')}", "", "", "")] if left > 0 else rows
