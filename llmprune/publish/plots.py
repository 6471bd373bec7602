"""Charts of the report as PNG files, for the model card."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.common.files import write_atomically
from llmprune.common.schema import format_count
from llmprune.publish.public_names import public_recovery
from llmprune.results.figures.layers import LayerFigures
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.report_schema import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT, _REMOVED, _CUT = "#3b6ea5", "#c9553d", "#b0863a"
_DASHES = "-", "--", "-.", ":"  # of ten lines each, which have a colour of their own
_SIZE = 7.2, 2.8  # inches
_DPI = 150


def draw(report: Report, folder: Path) -> dict[str, Path]:
    """Write the charts that the report has figures for; return their paths by name, such as ``importance``."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Axes], None]] = {}
    if searched := report.search:
        plots["frontier"] = lambda axes: _frontier(axes, searched)
    if any(layer.importance is not None for layer in report.layers):
        plots["importance"] = lambda axes: _importance(axes, report.layers)
    if any(layer.error_refit is not None for layer in report.layers):
        plots["error"] = lambda axes: _errors(axes, report.layers)
    if (found := report.recovery) and found.steps:
        plots["recovery"] = lambda axes: _recovery(axes, public_recovery(found))
    return {name: _save(folder / f"{name}.png", plot) for name, plot in plots.items()}


def _importance(axes: Axes, layers: Sequence[LayerFigures]) -> None:
    for removed, colour, name in ((False, _KEPT, "kept"), (True, _REMOVED, "removed")):
        shown = [layer for layer in layers if layer.removed is removed and layer.importance is not None]
        if shown:
            heights = [layer.importance or 0.0 for layer in shown]
            axes.bar([layer.layer for layer in shown], heights, color=colour, width=0.72, label=name)
    values = [layer.importance for layer in layers if layer.importance is not None and layer.importance > 0]
    if values and max(values) > 8 * sorted(values)[len(values) // 2]:
        axes.set_yscale("log")
    axes.set_ylabel("importance")
    _label_layers(axes)


def _errors(axes: Axes, layers: Sequence[LayerFigures]) -> None:
    lines = {"before its own refit": (_CUT, "error_cut"), "as saved": (_KEPT, "error_refit")}
    for name, (colour, field) in lines.items():
        points = [(layer.layer, getattr(layer, field)) for layer in layers]
        known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3, label=name)
    for layer in layers:
        if layer.removed:
            axes.axvspan(layer.layer - 0.5, layer.layer + 0.5, color=_REMOVED, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative error")
    _label_layers(axes)


def _frontier(axes: Axes, found: SearchFigures) -> None:
    line = found.frontier
    others = [one for one in found.tried if one not in line and one.broken is None]
    axes.scatter(*_sizes(others), facecolors="none", edgecolors="#888888", s=22, label="tried")
    axes.step(*_sizes(line), where="pre", color=_KEPT, marker="o", markersize=4, label="frontier")
    chosen = [found.chosen_shape(size) for size in found.sizes]
    axes.scatter(*_sizes(chosen), color=_REMOVED, s=48, zorder=3, label="chosen")
    values = [one.score for one in (*line, *others) if one.score > 0]
    if values and max(values) > 5 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("score")
    axes.xaxis.set_major_formatter(lambda parameters, _: format_count(parameters))


def _sizes(shapes: Sequence[TriedShape]) -> tuple[list[int], list[float]]:
    """Return the parameters and the scores of the shapes, those with a finite one."""
    finite = [one for one in shapes if math.isfinite(one.score)]
    return [one.parameters for one in finite], [one.score for one in finite]


def _recovery(axes: Axes, found: RecoveryFigures) -> None:
    tokens = [check.tokens for check in found.checks]
    for place, source in enumerate(found.before.divergence):
        values = [check.divergence[source] for check in found.checks]
        axes.plot(tokens, values, marker="o", markersize=3, linestyle=_DASHES[place // 10 % 4], label=source)
    axes.axvline(found.saved.tokens, color="#555555", linestyle=":", linewidth=1, label="saved")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("held-out KL divergence")
    axes.xaxis.set_major_formatter(lambda tokens, _: format_count(tokens))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _label_layers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer of the dense model")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _save(path: Path, plot: Callable[[Axes], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot(axes)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend() is None:
        axes.legend(frameon=False)
    # no date or version in the file, so that equal figures give equal bytes
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}))
    return path
