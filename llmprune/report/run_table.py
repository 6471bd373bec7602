"""Report of a run as a short table, printed at the end of the run."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.report.search_table import search_lines
from llmprune.results.figures.evaluation import GateFigures, GenerationFigures, Interval, TaskFigures
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.formatting import (
    fixed,
    interval_name,
    metric_name,
    number,
    percent,
    share,
    span,
    speedup,
)
from llmprune.results.report_schema import Report
from llmprune.results.sentences.evaluation import UNMEASURED, VERDICT_HEADINGS, describe_bar
from llmprune.results.sentences.layers import describe_sparsity
from llmprune.results.sentences.recovery import (
    describe_divergence,
    describe_gain,
    describe_recovery,
    describe_recovery_problems,
    describe_rounds,
)
from llmprune.results.sentences.result_files import describe_requantized
from llmprune.results.sentences.stability import describe_agreement, describe_sources
from llmprune.results.sentences.vocabulary import vocabulary_lines
from llmprune.results.tables.rounds import round_table
from llmprune.results.tables.sizes import size_rows

_STYLES = {"passed": "bold green", "failed": "bold red", "undecided": "bold yellow"}  # by state of the verdict


@dataclass(frozen=True)
class _Row:
    """Line of the summary table, as text."""

    label: str
    dense: str = ""
    cut: str = ""
    pruned: str = ""
    of_dense: str = ""


def print_summary(report: Report, console: Console) -> None:
    """Print dense and pruned figures, the gate's verdict, warnings and files, within 80 columns."""
    with_cut = report.perplexity is not None and report.perplexity.cut is not None
    console.print()
    console.print(_table([*_size_rows(report), *_evaluation_rows(report)], with_cut))
    console.print()
    if not report.measures_quality:
        console.print(_labelled(Text("Quality was not measured", "bold yellow"), Text(UNMEASURED)))
    if report.gate:
        console.print(_verdict(report.gate))
    for sentence in search_lines(report.search) if report.search else ():
        console.print(_labelled(Text("Search", "bold"), Text(sentence)))
    if report.recovery:
        _print_recovery(report, console)
    for sentence in vocabulary_lines(report):
        console.print(_labelled(Text("Vocabulary", "bold"), Text(sentence)))
    if report.sparsity:
        console.print(_labelled(Text("Sparsity", "bold"), Text(describe_sparsity(report.sparsity))))
    if report.requantized:
        console.print(_labelled(Text("Quantized", "bold"), Text(describe_requantized(report.requantized))))
    for sentence in describe_agreement(report.stability) if report.stability else ():
        console.print(_labelled(Text("Calibration check", "bold"), Text(sentence)))
    for sentence in describe_sources(report.sources) if report.sources else ():
        console.print(_labelled(Text("Sources", "bold"), Text(sentence)))
    for warning in report.warnings:
        console.print(_labelled(Text("Warning", "bold yellow"), Text(warning)))
    if report.files and (report.gate or report.warnings):
        console.print()
    longest = max(map(len, report.files), default=0)
    for name, path in report.files.items():  # a path is not wrapped, so that it can be copied
        console.print(Text.assemble((f"{name:<{longest}}  ", "dim"), path), soft_wrap=True)


def _print_recovery(report: Report, console: Console) -> None:
    """Print what was trained, the figures of each source, the scores before, and what went wrong."""
    found = report.recovery
    assert found is not None, "called only for a report of a training"
    sentences = [describe_recovery(found), describe_divergence(found)]
    if report.recovery_scores and (gain := describe_gain(report.recovery_scores)):
        sentences.append(gain)
    if report.rounds:
        console.print(_labelled(Text("Rounds", "bold"), Text(describe_rounds(report.rounds))))
        console.print()
        console.print(_round_table(report))
        console.print()
    console.print(_labelled(Text("Recovery", "bold"), Text("; ".join(sentences))))
    console.print()
    console.print(_source_table(found))
    console.print()
    for problem in describe_recovery_problems(found):
        console.print(_labelled(Text("Recovery", "bold yellow"), Text(problem)))


def _round_table(report: Report) -> Table:
    """Return the sizes and the held-out divergence of each round."""
    found = round_table(report)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in found.heads:
        table.add_column(head, justify="left" if head == "round" else "right", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    return table


def _source_table(found: RecoveryFigures) -> Table:
    """Return the divergence and perplexity on the held-out windows of each source, before and after."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("held-out windows of", overflow="fold")
    for head in ("KL before", "saved", "perplexity dense", "before", "saved"):
        table.add_column(head, justify="right")
    before, saved = found.before, found.saved
    for name, divergence in before.divergence.items():
        figures = fixed(divergence), fixed(saved.divergence[name])
        texts = found.dense_perplexity[name], before.perplexity[name], saved.perplexity[name]
        table.add_row(
            Text(name), *figures, *(fixed(text, 2) for text in texts), style="yellow" if name in found.worse else None
        )
    return table


def _verdict(gate: GateFigures) -> Table:
    """Return the verdict with one line per bar."""
    verdict = VERDICT_HEADINGS[gate.verdict]
    bars = "\n".join(describe_bar(bar) for bar in gate.bars)
    return _labelled(Text(verdict.heading, _STYLES[verdict.state]), Text(bars))


def _table(rows: list[_Row], with_cut: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold")
    heads = ["dense", "cut", "pruned", "of dense"] if with_cut else ["dense", "pruned", "of dense"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, style="bold" if head == "pruned" else None)
    for row in rows:
        figures = [row.dense, *([row.cut] if with_cut else []), row.pruned, row.of_dense]
        table.add_row(Text(row.label), *map(Text, figures))
    return table


def _size_rows(report: Report) -> list[_Row]:
    rows = size_rows(report.dense, report.pruned)
    return [_Row(row.label, dense=row.dense, pruned=row.pruned, of_dense=row.of_dense) for row in rows]


def _evaluation_rows(report: Report) -> list[_Row]:
    rows = []
    if found := report.perplexity:
        cut = "" if found.cut is None else number(found.cut)
        ratio = percent(share(found.dense, found.pruned))
        rows.append(_Row("perplexity", number(found.dense), cut, number(found.pruned), ratio))
        if found.repaired is not None:
            ratio = percent(share(found.dense, found.repaired))
            rows.append(_Row("  before the training", pruned=number(found.repaired), of_dense=ratio))
    if report.divergence:
        rows.append(_Row("KL divergence, median", pruned=fixed(report.divergence.quantiles["0.5"])))
    before = {score.task: score for score in report.recovery_scores.scores} if report.recovery_scores else {}
    for task in (*report.tasks, *report.groups):
        rows += _task_rows(task)
        if score := before.get(task.task):
            kept = percent(score.retention_before)
            rows.append(_Row("  before the training", pruned=fixed(score.before), of_dense=kept))
    if report.mean_retention is not None:
        rows.append(_Row("mean retention", of_dense=percent(report.mean_retention)))
        rows += _interval_rows(report.retention.interval if report.retention else None)
    if report.generation:
        rows += _generation_rows(report.generation)
    if speed := report.speed:
        figures = {"dense": number(speed.dense), "pruned": number(speed.pruned)}
        rows.append(_Row("generated tokens/s", **figures, of_dense=percent(speedup(speed))))
    return rows


def _generation_rows(free: GenerationFigures) -> list[_Row]:
    dense, pruned = free.dense, free.pruned
    agreement = []
    if found := free.agreement:
        agreement = [
            _Row("greedy agreement", of_dense=percent(found.share)),
            *_interval_rows(found.interval),
            _Row("  tokens before a difference, median", pruned=number(found.first_median)),
        ]
    return [
        *agreement,
        _Row("repetition", dense=percent(dense.repetition), pruned=percent(pruned.repetition)),
        _Row("texts that loop", dense=percent(dense.loops), pruned=percent(pruned.loops)),
    ]


def _task_rows(task: TaskFigures) -> list[_Row]:
    """Return scores, retention and interval; where lower is better, retention differs from the share of dense."""
    label, scores = f"{task.task} ({metric_name(task)})", {"dense": fixed(task.dense), "pruned": fixed(task.pruned)}
    if task.higher_is_better:
        rows = [_Row(label, **scores, of_dense=percent(task.retention))]
    else:
        rows = [
            _Row(label, **scores, of_dense=percent(share(task.dense, task.pruned))),
            _Row("  retained (dense / pruned)", of_dense=percent(task.retention)),
        ]
    return [*rows, *_interval_rows(task.interval)]


def _interval_rows(interval: Interval | None) -> list[_Row]:
    return [_Row(f"  {interval_name([interval])}", of_dense=span(interval))] if interval else []


def _labelled(label: Text, body: Text) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(label, body)
    return grid
