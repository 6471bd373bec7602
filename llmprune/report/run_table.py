"""The report as a short table: what a person sees in the terminal when a run ends."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.results.evaluation_figures import GateFigures, Interval, TaskFigures, Verdict
from llmprune.results.formatting import (
    UNMEASURED,
    agreement,
    count,
    describe_bar,
    describe_sparsity,
    fixed,
    if_changed,
    interval_name,
    metric_name,
    number,
    percent,
    share,
    span,
    speedup,
    weight,
    width_names,
)
from llmprune.results.schema import Report

Row = tuple[str, str, str, str, str]  # name, dense, cut, pruned, pruned / dense


def print_summary(report: Report, console: Console) -> None:
    """Print dense against pruned, the gate's verdict, warnings and files; 80 columns are enough."""
    with_cut = report.perplexity is not None and report.perplexity.cut is not None
    console.print()
    console.print(_table([*_size_rows(report), *_measured_rows(report)], with_cut))
    console.print()
    if not report.measures_quality:
        console.print(_beside(Text("Quality was not measured", "bold yellow"), Text(UNMEASURED)))
    if report.gate:
        console.print(_verdict(report.gate))
    if report.sparsity:
        console.print(_beside(Text("Sparsity", "bold"), Text(describe_sparsity(report.sparsity))))
    for sentence in agreement(report.stability) if report.stability else ():
        console.print(_beside(Text("Calibration check", "bold"), Text(sentence)))
    for warning in report.warnings:
        console.print(_beside(Text("Warning", "bold yellow"), Text(warning)))
    if report.files and (report.gate or report.warnings):
        console.print()
    longest = max(map(len, report.files), default=0)
    for name, path in report.files.items():  # a path stays whole, so that it can be copied
        console.print(Text.assemble((f"{name:<{longest}}  ", "dim"), path), soft_wrap=True)


VERDICTS: dict[Verdict, tuple[str, str]] = {
    "pass": ("Gate passed", "bold green"),
    "fail": ("Gate not passed", "bold red"),
    "not enough samples": ("Gate undecided", "bold yellow"),
    "no interval": ("Gate undecided", "bold yellow"),
}


def _verdict(gate: GateFigures) -> Table:
    """The verdict in words, and each bar on a line of its own."""
    said = "\n".join(describe_bar(bar) for bar in gate.bars)
    return _beside(Text(*VERDICTS[gate.verdict]), Text(said))


def _table(rows: list[Row], with_cut: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    heads = ["dense", "cut", "pruned", "of dense"] if with_cut else ["dense", "pruned", "of dense"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, style="bold" if head == "pruned" else None)
    for name, dense, cut, pruned, ratio in rows:
        figures = [dense, cut, pruned, ratio] if with_cut else [dense, pruned, ratio]
        table.add_row(Text(name), *map(Text, figures))
    return table


def _size_rows(report: Report) -> list[Row]:
    sizes: list[tuple[str, int | None, int | None, Callable[[float | None], str]]] = [
        ("parameters", report.dense.parameters, report.pruned.parameters, count),
        ("weights", report.dense.bytes, report.pruned.bytes, weight),
        ("layers", report.dense.layers, report.pruned.layers, number),
        *(
            (name, report.dense.widths[field], report.pruned.widths.get(field), number)
            for field, name in width_names(report.dense.widths).items()
        ),
        ("experts", report.dense.experts, report.pruned.experts, number),
        ("key-value heads", *if_changed(report.dense.kv_groups, report.pruned.kv_groups), number),
        ("KV cache per token", report.dense.kv_bytes_per_token, report.pruned.kv_bytes_per_token, weight),
    ]
    return [
        (name, write(dense), "", write(pruned), percent(share(dense, pruned)))
        for name, dense, pruned, write in sizes
        if dense is not None or pruned is not None
    ]


def _measured_rows(report: Report) -> list[Row]:
    rows: list[Row] = []
    if found := report.perplexity:
        cut = "" if found.cut is None else number(found.cut)
        ratio = percent(share(found.dense, found.pruned))
        rows.append(("perplexity", number(found.dense), cut, number(found.pruned), ratio))
    if far := report.divergence:
        rows.append(("KL divergence, median", "", "", fixed(far.quantiles["0.5"]), ""))
    for task in (*report.tasks, *report.groups):
        rows += _task_rows(task)
    if report.mean_retention is not None:
        rows.append(("mean retention", "", "", "", percent(report.mean_retention)))
        rows += _interval_rows(report.retention.interval if report.retention else None)
    if free := report.generation:
        for name, field in (("repetition", "repetition"), ("texts that loop", "loops")):
            before, after = getattr(free.dense, field), getattr(free.pruned, field)
            rows.append((name, percent(before), "", percent(after), ""))
    if speed := report.speed:
        rows.append(("generated tokens/s", number(speed.dense), "", number(speed.pruned), percent(speedup(speed))))
    return rows


def _task_rows(task: TaskFigures) -> list[Row]:
    """Both scores and the retention, which is no share of dense where lower is better; the interval below it."""
    name, scores = f"{task.task} ({metric_name(task)})", (fixed(task.dense), "", fixed(task.pruned))
    if task.higher_is_better:
        return [(name, *scores, percent(task.retention)), *_interval_rows(task.interval)]
    rows: list[Row] = [(name, *scores, percent(share(task.dense, task.pruned)))]
    rows.append(("  retained (dense / pruned)", "", "", "", percent(task.retention)))
    return [*rows, *_interval_rows(task.interval)]


def _interval_rows(interval: Interval | None) -> list[Row]:
    return [(f"  {interval_name([interval])}", "", "", "", span(interval))] if interval else []


def _beside(head: Text, body: Text) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(head, body)
    return grid
