"""The report as one HTML page: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from llmprune.common.schema import format_size
from llmprune.report.html.charts import Bar, bar_chart, error_chart, importance_chart, swatch
from llmprune.report.html.interval_charts import Whisker, retention_chart
from llmprune.results.evaluation_figures import PerplexityFigures, SpeedFigures, Verdict
from llmprune.results.formatting import (
    UNMEASURED,
    agreement,
    change,
    count,
    describe_bar,
    describe_carried,
    describe_left,
    describe_sparsity,
    describe_speedup,
    duration,
    fixed,
    if_changed,
    interval_name,
    metric_name,
    number,
    percent,
    plural,
    probability,
    ranges,
    span,
    speedup,
    times,
    weight,
    width_names,
)
from llmprune.results.schema import LayerFigures, Report, Size


@dataclass(frozen=True)
class Tile:
    """One figure of the headline."""

    name: str
    figure: str
    note: str


def render_page(report: Report) -> str:
    """The whole page as text; what the report does not hold is left out."""
    return _template().render(
        report=report,
        name=_model_name(report),
        sentence=_sentence(report),
        tiles=_tiles(report),
        sizes=_size_rows(report.dense, report.pruned),
        importance=importance_chart(report.layers),
        errors=error_chart(report.layers),
        removed=ranges(report.removed_layers),
        unmeasured=UNMEASURED if not report.measures_quality else None,
        columns=_layer_columns(report.layers),
        matrices=_matrices(report.layers),
        agreement=agreement(report.stability) if report.stability else [],
        perplexity=_perplexity_bars(report.perplexity) if report.perplexity else None,
        speed=_speed_bars(report.speed) if report.speed else None,
        retention=retention_chart(_whiskers(report)),
        interval_name=interval_name([task.interval for task in report.tasks]),
        verdict=VERDICTS[report.gate.verdict] if report.gate else None,
    )


VERDICTS: dict[Verdict, tuple[str, str]] = {  # CSS class and words
    "pass": ("passed", "Gate passed."),
    "fail": ("failed", "Gate not passed."),
    "not enough samples": ("undecided", "Gate undecided."),
    "no interval": ("undecided", "Gate undecided."),
}


def _template() -> Template:
    return environment().get_template("page.html.j2")


@cache
def environment() -> Environment:
    """The pages' templates and how they write figures."""
    environment = Environment(
        loader=PackageLoader("llmprune.report.html", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        fixed=fixed,
        percent=percent,
        duration=duration,
        plural=plural,
        count=count,
        weight=weight,
        ranges=ranges,
        breakable=_breakable,
        sparsity=describe_sparsity,
        carried=describe_carried,
        left=describe_left,
    )
    environment.filters.update(span=span, probability=probability, bar=describe_bar, metric=metric_name)
    environment.filters.update(times=times, speedup=speedup, varies=describe_speedup)
    environment.globals.update(swatch=swatch)
    return environment


def _breakable(name: str) -> Markup:
    """A long task name may wrap after each underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _model_name(report: Report) -> str:
    """The last part of a hub id or a path."""
    return report.provenance.model.rstrip("/").rsplit("/", 1)[-1] or report.provenance.model


def _sentence(report: Report) -> str:
    """What was cut, in words."""
    dense, pruned = report.dense, report.pruned
    said = []
    if pruned.layers < dense.layers:
        said.append(f"{dense.layers - pruned.layers} of {plural(dense.layers, 'layer')} removed")
    if dense.experts and pruned.experts and pruned.experts < dense.experts:
        said.append(f"{dense.experts - pruned.experts} of {plural(dense.experts, 'expert')} removed from each mixture")
    if dense.kv_groups and pruned.kv_groups and pruned.kv_groups < dense.kv_groups:
        gone = dense.kv_groups - pruned.kv_groups
        said.append(f"{gone} of {plural(dense.kv_groups, 'key-value head')} removed from each layer with its queries")
    narrowed = [field for field, width in dense.widths.items() if pruned.widths.get(field, width) < width]
    for field in narrowed:
        which = f" ({field})" if len(dense.widths) > 1 else ""
        said.append(f"MLPs narrowed from {dense.widths[field]:,} to {pruned.widths[field]:,} neurons{which}")
    if report.sparsity:
        said.append(
            f"{report.sparsity.pattern} sparsity in {plural(report.sparsity.matrices, 'matrix', many='matrices')}"
        )
    if not said:
        return "No layer removed, no MLP narrowed."
    return (sentence := ", ".join(said))[0].upper() + sentence[1:] + "."


def _tiles(report: Report) -> list[Tile]:
    dense, pruned, perplexity, speed = report.dense, report.pruned, report.perplexity, report.speed
    tiles = [
        Tile(
            "size of the weights",
            change(dense.bytes, pruned.bytes),
            f"{format_size(dense.bytes)} → {format_size(pruned.bytes)}",
        )
    ]
    if report.sparsity:
        zeros, weights = report.sparsity.zeros, report.sparsity.weights
        note = f"{percent(zeros / weights)} of the matrices with the pattern {report.sparsity.pattern}"
        tiles.append(Tile("weights made zero", percent(zeros / pruned.parameters), note))
    if speed:
        tiles.append(
            Tile(
                "generation speed",
                times(speedup(speed)),
                describe_speedup(speed),
            )
        )
    if report.mean_retention is not None:
        within = f"{span(report.retention.interval)}, " if report.retention else ""
        counted = len(report.retention.counted) if report.retention else len(report.tasks)
        tiles.append(Tile("scores retained", percent(report.mean_retention), f"{within}{plural(counted, 'task')}"))
    if perplexity:
        tiles.append(Tile("perplexity", number(perplexity.pruned), f"dense {number(perplexity.dense)}"))
    return tiles


def _whiskers(report: Report) -> list[Whisker]:
    """The mean where it is one of several, groups, and the tasks that are in none of these."""
    rows = []
    bars = {bar.name: bar.min_retention for bar in report.gate.bars} if report.gate else {}
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
            rows.append(Whisker(task.task, task.retention, low, high, task.task in groups, bar))
    return rows


def _size_rows(dense: Size, pruned: Size) -> list[tuple[str, str, str, str]]:
    """Name, dense, pruned and change of each measure of size that is known."""
    rows: list[tuple[str, int | None, int | None, Callable[[float | None], str]]] = [
        ("Parameters", dense.parameters, pruned.parameters, count),
        ("Weights", dense.bytes, pruned.bytes, weight),
        ("Layers", dense.layers, pruned.layers, number),
        *(
            (name, dense.widths[field], pruned.widths.get(field), number)
            for field, name in width_names(dense.widths).items()
        ),
        ("Experts", dense.experts, pruned.experts, number),
        ("Key-value heads", *if_changed(dense.kv_groups, pruned.kv_groups), number),
        ("Key-value cache per token", dense.kv_bytes_per_token, pruned.kv_bytes_per_token, weight),
    ]
    return [
        (name, write(before), write(after), change(before, after))
        for name, before, after, write in rows
        if before is not None or after is not None
    ]


def _layer_columns(layers: tuple[LayerFigures, ...]) -> dict[str, bool]:
    """Which figures any layer has, so that the table shows no empty column."""
    return {
        name: any(getattr(layer, name) is not None for layer in layers)
        for name in (
            *("importance", "width", "kv_groups_kept", "kv_groups_share", "experts_kept", "score_share"),
            *("error_cut", "error_refit", "held_out", "mixer_held_out", "up_held_out"),
        )
    }


@dataclass(frozen=True)
class Matrices:
    """The errors of sparse matrices: by layer, one for each name that any layer has."""

    names: list[str]
    rows: list[tuple[int, list[float | None]]]

    @property
    def measured(self) -> bool:
        """Whether there is any."""
        return any(error is not None for _, errors in self.rows for error in errors)


def _matrices(layers: tuple[LayerFigures, ...]) -> Matrices:
    names = list(dict.fromkeys(one.name for layer in layers for one in layer.matrices))
    rows = []
    for layer in layers:
        errors = {one.name: one.error for one in layer.matrices}
        if errors:
            rows.append((layer.layer, [errors.get(name) for name in names]))
    return Matrices([name.rpartition(".")[2] for name in names], rows)


def _perplexity_bars(perplexity: PerplexityFigures) -> Markup:
    bars = [Bar("dense", perplexity.dense, "dense")]
    if perplexity.cut is not None:
        bars.append(Bar("cut", perplexity.cut, "cut"))
    bars.append(Bar("cut and refit" if len(bars) > 1 else "pruned", perplexity.pruned, "pruned"))
    return bar_chart("perplexity", "Perplexity; lower is better", bars=bars)


def _speed_bars(speed: SpeedFigures) -> Markup:
    bars = [Bar("dense", speed.dense, "dense"), Bar("pruned", speed.pruned, "pruned")]
    return bar_chart("speed", "Generated tokens per second", bars=bars, say=lambda value: f"{number(value)} tokens/s")
