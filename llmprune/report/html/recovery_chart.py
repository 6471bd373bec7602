"""Chart of a training: held-out divergence of each source against the tokens, with the step whose weights were saved.

As in ``charts``, horizontal positions are percentages and vertical positions pixels. Lines have the number of their
source in the table at their end, and a dash of their own besides the colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.common.schema import format_count
from llmprune.report.html.charts import MOST_MARKERS, PLOT, TOP, Axis, grid, linear_axis, linear_ticks, log_axis, svg
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.formatting import fixed

COLOURS = 6  # after them the same colours come again, with other dashes
_FOOT = 46  # pixels: ticks, and the name of the axis
_APART = 15  # pixels between the numbers of two lines
_WIDTH = 1000  # of the lines' coordinates
_LOG_FROM = 5  # ratio of the highest to the lowest value from which the axis is logarithmic


@dataclass(frozen=True)
class _Line:
    """Points (tokens, divergence) of a source, those of the checks with a finite value."""

    place: int
    source: str
    points: tuple[tuple[int, float], ...]


def recovery_chart(found: RecoveryFigures) -> Markup | None:
    """Draw the lines of all sources. None where nothing was trained, or no divergence is finite."""
    lines = _lines(found)
    last = found.checks[-1].tokens
    if not lines or last <= 0:
        return None
    axis = _axis([value for line in lines for _, value in line.points])
    body = [
        grid(axis, "KL divergence, log scale" if axis.log else "KL divergence"),
        _saved(100 * found.saved.tokens / last),
        *(_draw(line, axis=axis, last=last) for line in lines),
        _numbers(lines, axis=axis),
        _tokens(last),
    ]
    ends = "; ".join(f"{line.source}: {fixed(line.points[0][1])} to {fixed(line.points[-1][1])}" for line in lines)
    text = f"Lines over {format_count(last)} tokens. {ends}. Saved after {format_count(found.saved.tokens)} tokens."
    return svg(
        "recovery",
        "Held-out divergence from the dense model during the training",
        text=text,
        height=TOP + PLOT + _FOOT,
        body=body,
    )


def series_swatch(place: int) -> Markup:
    """Draw the line of the source at this place, for a table or legend."""
    return Markup(
        '<svg class="swatch" width="22" height="10" aria-hidden="true"><line class="{}" x1="0" x2="22" y1="5" y2="5"/>'
        "</svg>"
    ).format(_class(place))


def _lines(found: RecoveryFigures) -> list[_Line]:
    lines = []
    for place, source in enumerate(found.before.divergence):
        points = [(check.tokens, check.divergence[source]) for check in found.checks]
        finite = tuple(point for point in points if math.isfinite(point[1]))
        if finite:
            lines.append(_Line(place, source, finite))
    return lines


def _axis(values: Sequence[float]) -> Axis:
    if min(values) > 0 and max(values) > _LOG_FROM * min(values):
        return log_axis(min(values) * 0.8, max(values) * 1.1)
    return linear_axis(values)


def _draw(line: _Line, *, axis: Axis, last: int) -> Markup:
    path = " ".join(f"{_WIDTH * tokens / last:.1f},{axis.y(value) - TOP:.1f}" for tokens, value in line.points)
    drawn = Markup(
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none" '
        'overflow="visible"><polyline class="{}" points="{}"/></svg>'
    ).format(TOP, PLOT, _WIDTH, PLOT, _class(line.place), path)
    if len(line.points) > MOST_MARKERS:
        return drawn
    dot = Markup('<circle class="dot {}" cx="{:.2f}%" cy="{}" r="2.4"><title>{}</title></circle>')
    return drawn + Markup("").join(
        dot.format(
            f"series-{line.place % COLOURS}",
            100 * tokens / last,
            axis.y(value),
            f"{line.source}: {fixed(value)} after {format_count(tokens)} tokens",
        )
        for tokens, value in line.points
    )


def _class(place: int) -> str:
    return f"line series-{place % COLOURS} dash-{place % COLOURS if place < COLOURS else COLOURS}"


def _saved(x: float) -> Markup:
    """Draw a vertical mark at the saved weights, its name on the side that has room."""
    side, shift = ("end", -6) if x > 50 else ("", 6)
    return Markup(
        '<line class="saved" x1="{x:.2f}%" x2="{x:.2f}%" y1="{}" y2="{}"/>'
        '<text class="tick halo {}" x="{x:.2f}%" dx="{}" y="{}">saved</text>'
    ).format(TOP - 6, TOP + PLOT, side, shift, TOP - 2, x=x)


def _numbers(lines: Sequence[_Line], *, axis: Axis) -> Markup:
    """Draw the number of each line at its end, moved apart where two ends are close."""
    ends = sorted((axis.y(line.points[-1][1]), line.place) for line in lines)
    heights: list[float] = []
    for y, _ in ends:
        heights.append(max(y, heights[-1] + _APART) if heights else y)
    limit = float(TOP + PLOT)
    for index in reversed(range(len(heights))):  # the lowest stay within the plot
        heights[index] = min(heights[index], limit)
        limit = heights[index] - _APART
    number = Markup('<text class="tick series-text" x="100%" dx="9" y="{:.1f}">{}</text>')
    return Markup("").join(
        number.format(height + 4, place + 1) for height, (_, place) in zip(heights, ends, strict=True)
    )


def _tokens(last: int) -> Markup:
    """Draw the numbers and the name of the horizontal axis."""
    ticks = [tick for tick in linear_ticks(0, last, parts=4) if tick <= last]
    mark = Markup('<text class="tick {}" x="{:.2f}%" y="{}">{}</text>')
    return Markup("").join(
        mark.format("mid" if tick else "", 100 * tick / last, TOP + PLOT + 20, format_count(tick)) for tick in ticks
    ) + Markup('<text class="tick end" x="100%" y="{}">tokens trained on</text>').format(TOP + PLOT + 40)
