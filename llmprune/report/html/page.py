"""Report as one self-contained HTML page: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jinja2 import Environment
from markupsafe import Markup, escape

from llmprune.common.schema import format_size
from llmprune.report.html.charts import Bar, bar_chart, error_chart, importance_chart, swatch
from llmprune.report.html.interval_charts import Whisker, retention_chart
from llmprune.report.html.recovery_chart import recovery_chart, series_swatch
from llmprune.report.html.search_section import view_search
from llmprune.results.figures.evaluation import SpeedFigures
from llmprune.results.figures.layers import LayerFigures
from llmprune.results.formatting import (
    change,
    count,
    interval_name,
    number,
    percent,
    plural,
    ranges,
    span,
    speedup,
    times,
)
from llmprune.results.report_schema import Report
from llmprune.results.sentences.evaluation import UNMEASURED, VERDICT_HEADINGS, describe_speedup
from llmprune.results.sentences.stability import describe_agreement, describe_sources
from llmprune.results.sentences.vocabulary import vocabulary_lines
from llmprune.results.tables.rounds import round_table
from llmprune.results.tables.sizes import size_rows
from llmprune.results.templates import template_environment


@dataclass(frozen=True)
class Tile:
    """Headline figure on top of the page, with its name and a note below it."""

    name: str
    figure: str
    note: str


@dataclass(frozen=True)
class MatrixTable:
    """Errors of sparse matrices: a row per layer, a column per matrix name."""

    names: list[str]
    rows: list[tuple[int, list[float | None]]]  # layer, and the error of each matrix; None if it has no such matrix

    @property
    def measured(self) -> bool:
        """Check that any error was measured."""
        return any(error is not None for _, errors in self.rows for error in errors)


def render_page(report: Report) -> str:
    """Return the page as text, without sections for figures that the report does not have."""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            report=report,
            vocabulary=vocabulary_lines(report),
            sentence=_summary_sentence(report),
            tiles=_tiles(report),
            sizes=size_rows(report.dense, report.pruned),
            importance=importance_chart(report.layers),
            errors=error_chart(report.layers),
            removed=ranges(report.removed_layers),
            unmeasured=UNMEASURED if not report.measures_quality else None,
            columns=_layer_columns(report.layers),
            matrices=_matrix_table(report.layers),
            agreement=describe_agreement(report.stability) if report.stability else [],
            sources=describe_sources(report.sources) if report.sources else [],
            recovery=recovery_chart(report.recovery) if report.recovery else None,
            rounds=round_table(report) if report.rounds else None,
            search=view_search(report.search) if report.search else None,
            perplexity=_perplexity_bars(report) if report.perplexity else None,
            speed=_speed_bars(report.speed) if report.speed else None,
            retention=retention_chart(_whiskers(report)),
            interval_name=interval_name([task.interval for task in report.tasks]),
            scores_interval=interval_name(
                score.gain_interval for score in (report.recovery_scores.scores if report.recovery_scores else ())
            ),
            verdict=VERDICT_HEADINGS[report.gate.verdict] if report.gate else None,
        )
    )


@cache
def environment() -> Environment:
    """Return the Jinja environment of the report page and the comparison page."""
    environment = template_environment("llmprune.report.html")
    environment.filters["breakable"] = _breakable
    environment.globals.update(swatch=swatch, series_swatch=series_swatch)
    return environment


def _breakable(name: str) -> Markup:
    """Return a name that may wrap after each underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _summary_sentence(report: Report) -> str:
    """Return one sentence that lists what was pruned."""
    dense, pruned = report.dense, report.pruned
    parts = []
    if pruned.layers < dense.layers:
        parts.append(f"{dense.layers - pruned.layers} of {plural(dense.layers, 'layer')} removed")
    if dense.experts and pruned.experts and pruned.experts < dense.experts:
        parts.append(f"{dense.experts - pruned.experts} of {plural(dense.experts, 'expert')} removed from each mixture")
    if dense.kv_groups and pruned.kv_groups and pruned.kv_groups < dense.kv_groups:
        removed = dense.kv_groups - pruned.kv_groups
        parts.append(
            f"{removed} of {plural(dense.kv_groups, 'key-value head')} removed from each layer with its queries"
        )
    if dense.hidden and pruned.hidden and pruned.hidden < dense.hidden:
        parts.append(f"hidden size reduced from {dense.hidden:,} to {pruned.hidden:,}")
    narrowed = [field for field, width in dense.widths.items() if pruned.widths.get(field, width) < width]
    for field in narrowed:
        which = f" ({field})" if len(dense.widths) > 1 else ""
        parts.append(f"MLPs narrowed from {dense.widths[field]:,} to {pruned.widths[field]:,} neurons{which}")
    if report.vocabulary:
        found = report.vocabulary
        parts.append(f"{found.tokens - found.kept:,} of {plural(found.tokens, 'token')} removed")
    if report.sparsity:
        matrices = plural(report.sparsity.matrices, "matrix", many="matrices")
        parts.append(f"{report.sparsity.pattern} sparsity in {matrices}")
    if report.trained_tokens:
        rounds = f" in {plural(len(report.rounds), 'round')}" if report.rounds else ""
        parts.append(f"trained on {count(report.trained_tokens)} tokens{rounds}")
    if not parts:
        return "No layer removed, no MLP narrowed."
    return (sentence := ", ".join(parts))[0].upper() + sentence[1:] + "."


def _tiles(report: Report) -> list[Tile]:
    dense, pruned = report.dense, report.pruned
    sizes = f"{format_size(dense.bytes)} → {format_size(pruned.bytes)}"
    tiles = [Tile("size of the weights", change(dense.bytes, pruned.bytes), sizes)]
    if report.sparsity:
        zeros, weights = report.sparsity.zeros, report.sparsity.weights
        note = f"{percent(zeros / weights)} of the matrices with the pattern {report.sparsity.pattern}"
        tiles.append(Tile("weights set to zero", percent(zeros / pruned.parameters), note))
    if report.speed:
        tiles.append(Tile("generation speed", times(speedup(report.speed)), describe_speedup(report.speed)))
    if report.mean_retention is not None:
        interval = f"{span(report.retention.interval)}, " if report.retention else ""
        counted = len(report.retention.counted) if report.retention else len(report.tasks)
        tiles.append(Tile("mean retention", percent(report.mean_retention), f"{interval}{plural(counted, 'task')}"))
    if report.generation and (agreement := report.generation.agreement):
        note = f"{span(agreement.interval)}, {plural(agreement.samples, 'answer')} of the dense model"
        tiles.append(Tile("greedy agreement", percent(agreement.share), note))
    if perplexity := report.perplexity:
        tiles.append(Tile("perplexity", number(perplexity.pruned), f"dense {number(perplexity.dense)}"))
    return tiles


def _whiskers(report: Report) -> list[Whisker]:
    """Return the rows of the retention chart: the mean of several, groups, and tasks that are in no group."""
    rows = []
    bars = {bar.name: bar.minimum for bar in report.gate.bars if bar.kind == "retention"} if report.gate else {}
    alone = report.retention is not None and len(report.retention.counted) == 1
    if (mean := report.retention) and not alone:
        rows.append(
            Whisker("mean", mean.retention, mean.interval.low, mean.interval.high, strong=True, bar=bars.get("mean"))
        )
    groups = {group.task for group in report.groups}
    for task in (*report.groups, *report.tasks):
        if task.retention is not None and task.group not in groups:
            low, high = (task.interval.low, task.interval.high) if task.interval else (None, None)
            bar = bars.get(task.task, bars.get("mean") if alone and task.interval else None)
            rows.append(Whisker(task.task, task.retention, low, high, strong=task.task in groups, bar=bar))
    return rows


def _layer_columns(layers: tuple[LayerFigures, ...]) -> dict[str, bool]:
    """Return which columns of the layer table have a figure in any layer."""
    return {
        name: any(getattr(layer, name) is not None for layer in layers)
        for name in (
            *("importance", "width", "kv_groups_kept", "kv_groups_share", "experts_kept", "score_share"),
            *("error_cut", "error_refit", "held_out", "mixer_held_out", "up_held_out", "block"),
        )
    }


def _matrix_table(layers: tuple[LayerFigures, ...]) -> MatrixTable:
    names = list(dict.fromkeys(matrix.name for layer in layers for matrix in layer.matrices))
    rows = []
    for layer in layers:
        errors = {matrix.name: matrix.error for matrix in layer.matrices}
        if errors:
            rows.append((layer.layer, [errors.get(name) for name in names]))
    return MatrixTable([name.rpartition(".")[2] for name in names], rows)


def _perplexity_bars(report: Report) -> Markup:
    perplexity = report.perplexity
    assert perplexity is not None, "called only for a report with perplexity"
    bars = [Bar("dense", perplexity.dense, "dense")]
    if perplexity.cut is not None:
        bars.append(Bar("cut", perplexity.cut, "cut"))
    if perplexity.repaired is not None:
        bars.append(Bar("before the training", perplexity.repaired, "cut"))
    last = "trained" if report.recovery else "cut and refit" if perplexity.cut is not None else "pruned"
    bars.append(Bar(last, perplexity.pruned, "pruned"))
    return bar_chart("perplexity", "Perplexity; lower is better", bars=bars)


def _speed_bars(speed: SpeedFigures) -> Markup:
    bars = [Bar("dense", speed.dense, "dense"), Bar("pruned", speed.pruned, "pruned")]
    return bar_chart("speed", "Generated tokens per second", bars=bars, write=lambda value: f"{number(value)} tokens/s")
