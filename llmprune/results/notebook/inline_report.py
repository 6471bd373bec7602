"""Report as a compact HTML table for notebooks, without script and with every text escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from markupsafe import Markup

from llmprune.common.printing import printable
from llmprune.results.formatting import byte_size, change, count, metric_name, number, percent, plural, span, speedup

if TYPE_CHECKING:
    from llmprune.results.figures.model_size import Size
    from llmprune.results.report_schema import Report

_CELL = "padding:.15em 1em .15em 0;text-align:{};border:0"
_VERDICTS = {"pass": "Gate passed", "fail": "Gate not passed"}
_MAX_TASKS = 20  # rows
_Row = tuple[str, str, str, str]


def inline_report(report: Report) -> str:
    """Return a table of sizes and results of the dense and the pruned model, the gate's verdict and the warnings."""
    rows = [*_sizes(report.dense, report.pruned), *_quality(report), *_tasks(report)]
    parts = [
        Markup('<div style="max-width:56em;font-family:system-ui,sans-serif"><p><strong>{}</strong>{}</p>').format(
            printable(report.provenance.model), _verdict(report)
        ),
        _table(rows),
        *(Markup("<p>Warning: {}</p>").format(printable(warning)) for warning in report.warnings),
        Markup("</div>"),
    ]
    return str(Markup("").join(parts))


def _table(rows: Iterable[_Row]) -> Markup:
    heads = ("", "dense", "pruned", "change or retention")
    lines = [_line("th", heads, row_head="td"), *(_line("td", row, row_head="th") for row in rows)]
    return Markup('<table style="border-collapse:collapse">{}</table>').format(Markup("").join(lines))


def _line(kind: str, cells: _Row, *, row_head: str) -> Markup:
    made = [_cell(row_head, cells[0], side="left"), *(_cell(kind, text, side="right") for text in cells[1:])]
    return Markup("<tr>{}</tr>").format(Markup("").join(made))


def _cell(kind: str, text: str, *, side: str) -> Markup:
    style = _CELL.format(side)
    return Markup('<{kind} style="{style}">{text}</{kind}>').format(kind=kind, style=style, text=printable(text))


def _verdict(report: Report) -> str:
    return f" – {_VERDICTS.get(report.gate.verdict, 'Gate undecided')}" if report.gate else ""


def _sizes(dense: Size, pruned: Size) -> list[_Row]:
    before, after = dense, pruned
    rows = [
        ("Parameters", count(before.parameters), count(after.parameters), change(before.parameters, after.parameters)),
        ("Weights", byte_size(before.bytes), byte_size(after.bytes), change(before.bytes, after.bytes)),
        ("Layers", number(before.layers), number(after.layers), change(before.layers, after.layers)),
    ]
    for field, width in before.widths.items():
        kept = after.widths.get(field, width)
        name = "MLP width" if len(before.widths) == 1 else field
        rows.append((name, number(width), number(kept), change(width, kept)))
    if before.experts and after.experts:
        rows.append(("Experts", number(before.experts), number(after.experts), change(before.experts, after.experts)))
    return rows


def _quality(report: Report) -> list[_Row]:
    rows = []
    if report.perplexity:
        dense, pruned = report.perplexity.dense, report.perplexity.pruned
        rows.append(("Perplexity", number(dense), number(pruned), change(dense, pruned)))
    if report.speed:
        dense, pruned = report.speed.dense, report.speed.pruned
        rows.append(("Tokens per second", number(dense), number(pruned), f"{number(speedup(report.speed))}×"))
    if report.mean_retention is not None:
        interval = f" ({span(report.retention.interval)})" if report.retention else ""
        rows.append(("Mean retention", "", "", f"{percent(report.mean_retention)}{interval}"))
    return rows


def _tasks(report: Report) -> list[_Row]:
    rows = []
    for task in (*report.groups, *report.tasks)[:_MAX_TASKS]:
        interval = f" ({span(task.interval)})" if task.interval else ""
        name = f"{task.task}, {metric_name(task)}"
        rows.append((name, number(task.dense), number(task.pruned), f"{percent(task.retention)}{interval}"))
    left = len(report.groups) + len(report.tasks) - _MAX_TASKS
    return [*rows, (f"and {plural(left, 'more task')}", "", "", "")] if left > 0 else rows
