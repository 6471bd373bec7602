"""Charts of retention with its interval: a row per task, and size against retention of several runs.

As in ``charts``, horizontal positions are percentages and vertical positions pixels, and colours come from the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.report.html.charts import linear_ticks, svg
from llmprune.results.formatting import percent

ROW, FOOT = 50, 34  # pixels: one row; ticks and their numbers
PLOT, TOP, BOTTOM = 300, 30, 46  # pixels: plot area, the heading above it, ticks below


@dataclass(frozen=True)
class Whisker:
    """Retention with the ends of its interval; ``strong`` rows are the mean and groups."""

    label: str
    point: float
    low: float | None
    high: float | None
    strong: bool = False
    bar: float | None = None  # minimum retention that the gate requires for this row


@dataclass(frozen=True)
class Dot:
    """Size of one run as a share of the dense size, and its retention with the ends of its interval."""

    label: str
    size: float
    point: float
    low: float | None
    high: float | None


def retention_chart(rows: Sequence[Whisker]) -> Markup | None:
    """Draw a dot with its interval for every row, on one scale with a line at 100 %. None without rows."""
    rows = [row for row in rows if math.isfinite(row.point)]
    if not rows:
        return None
    bars = [row.bar for row in rows if row.bar is not None]
    ends = [end for row in rows for end in (row.low, row.high, row.point) if end is not None]
    low, high = min(*ends, *bars, 1.0), min(max(*ends, 1.0), 2.0)
    ticks = linear_ticks(max(low - 0.1 * (high - low), 0), high, parts=4)
    scale = _Scale(ticks[0], ticks[-1])
    height = len(rows) * ROW
    body = [_ticks(scale, ticks, height=height), *(_row(row, place, scale=scale) for place, row in enumerate(rows))]
    text = "; ".join(f"{row.label}: {_value(row)}" for row in rows)
    return svg("retention", "Retention of the dense score", text=text, height=height + FOOT, body=body)


def size_chart(dots: Sequence[Dot]) -> Markup | None:
    """Draw numbered dots with intervals: share of the dense size against retention. None without a retention."""
    dots = [dot for dot in dots if math.isfinite(dot.point)]
    if not dots:
        return None
    ends = [end for dot in dots for end in (dot.low, dot.high, dot.point) if end is not None]
    low, high = min(*ends, 1.0), min(max(*ends, 1.0), 2.0)
    up = linear_ticks(max(low - 0.05, 0), high, parts=5)
    sizes = [dot.size for dot in dots]
    across = linear_ticks(max(min(sizes) - 0.05, 0), max(*sizes, 1.0), parts=5)
    x, y = _Scale(across[0], across[-1]), _Scale(up[0], up[-1])
    numbers_at: dict[tuple[int, int], list[int]] = {}  # by rounded position: overlapping dots are drawn as one
    for number, dot in enumerate(dots, start=1):
        numbers_at.setdefault((round(x.at(dot.size) / 2), round(_up(y, dot.point) / 8)), []).append(number)
    body = [
        *_retention_axis(y, up),
        *_size_axis(x, across),
        *(_dot(numbers, dots[numbers[0] - 1], x=x, y=y) for numbers in numbers_at.values()),
    ]
    text = "; ".join(_described(dot) for dot in dots)
    return svg("size-retention", "Size against retention", text=text, height=TOP + PLOT + BOTTOM, body=body)


def _retention_axis(scale: _Scale, ticks: Sequence[float]) -> list[Markup]:
    """Draw the vertical axis with a line at each tick."""
    line = Markup('<line class="{}" x1="0" x2="100%" y1="{y}" y2="{y}"/><text class="tick end" x="-8" y="{}">{}</text>')
    digits = tick_digits(ticks)
    return [
        Markup('<text class="tick" x="-44" y="12">retained</text>'),
        *(
            line.format(
                "zero" if math.isclose(tick, 1) else "grid",
                _up(scale, tick) + 4,
                percent(tick, digits),
                y=_up(scale, tick),
            )
            for tick in ticks
        ),
    ]


def _size_axis(scale: _Scale, ticks: Sequence[float]) -> list[Markup]:
    """Draw the numbers and the name of the horizontal axis."""
    number = Markup('<text class="tick {}" x="{:.3f}%" y="{}">{}</text>')
    digits = tick_digits(ticks)
    return [
        *(
            number.format("end" if tick == ticks[-1] else "mid", scale.at(tick), TOP + PLOT + 20, percent(tick, digits))
            for tick in ticks
        ),
        Markup('<text class="tick end" x="100%" y="{}">size of the weights, of dense</text>').format(TOP + PLOT + 40),
    ]


def _described(dot: Dot) -> str:
    return f"{dot.label}: {percent(dot.size)} of the size, {percent(dot.point)} retained"


@dataclass(frozen=True)
class _Scale:
    """Linear map from a value to percent of the axis."""

    low: float
    high: float

    def at(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return share * 100


def _up(scale: _Scale, value: float) -> float:
    return round(TOP + PLOT * (1 - scale.at(value) / 100), 1)


def _ticks(scale: _Scale, ticks: Sequence[float], *, height: int) -> Markup:
    line = Markup('<line class="{}" x1="{x:.3f}%" x2="{x:.3f}%" y1="0" y2="{}"/>')
    number = Markup('<text class="tick {}" x="{x:.3f}%" y="{}">{}</text>')
    anchors = {ticks[0]: "", ticks[-1]: "end"}
    digits = tick_digits(ticks)
    return Markup("").join(
        line.format("zero" if math.isclose(tick, 1) else "grid", height + 6, x=scale.at(tick))
        + number.format(anchors.get(tick, "mid"), height + 22, percent(tick, digits), x=scale.at(tick))
        for tick in ticks
    )


def tick_digits(ticks: Sequence[float]) -> int:
    """Return the decimals that percentages at these ticks need, at most two."""
    return next((digits for digits in (0, 1) if all(_is_round(tick * 100, digits) for tick in ticks)), 2)


def _is_round(value: float, digits: int) -> bool:
    return abs(value - round(value, digits)) < 1e-6


def _row(row: Whisker, place: int, *, scale: _Scale) -> Markup:
    top = place * ROW
    y = top + 34
    parts = [
        Markup('<text class="{}" x="0" y="{}">{}</text>').format(
            "name value" if row.strong else "name", top + 18, row.label
        )
        + Markup('<text class="end halo" x="100%" y="{}">{}</text>').format(top + 18, _value(row))
    ]
    if row.low is not None and row.high is not None:
        parts.append(
            Markup('<rect class="span{}" x="{:.3f}%" y="{}" width="{:.3f}%" height="{}" rx="3"/>').format(
                " strong" if row.strong else "",
                scale.at(row.low),
                y - 4,
                max(scale.at(row.high) - scale.at(row.low), 0.3),
                8,
            )
        )
    if row.bar is not None:
        parts.append(
            Markup('<line class="bar" x1="{x:.3f}%" x2="{x:.3f}%" y1="{}" y2="{}"><title>gate</title></line>').format(
                y - 11, y + 11, x=scale.at(row.bar)
            )
        )
    parts.append(
        Markup('<circle class="dot pruned" cx="{:.3f}%" cy="{}" r="{}"/>').format(
            scale.at(row.point), y, 6 if row.strong else 4.5
        )
    )
    return Markup("").join(parts)


def _value(row: Whisker) -> str:
    if row.low is None or row.high is None:
        return percent(row.point)
    within = f"{row.low * 100:.1f}–{percent(row.high)}"
    return f"{percent(row.point)} ({within})"


def _dot(numbers: Sequence[int], dot: Dot, *, x: _Scale, y: _Scale) -> Markup:
    """Draw a dot with the first of the numbers in it; the others are written next to it."""
    number, *others = numbers
    parts = []
    if dot.low is not None and dot.high is not None:
        parts.append(
            Markup('<line class="whisker" x1="{x:.3f}%" x2="{x:.3f}%" y1="{}" y2="{}"/>').format(
                _up(y, dot.high), _up(y, dot.low), x=x.at(dot.size)
            )
        )
    parts.append(
        Markup(
            '<circle class="dot pruned" cx="{x:.3f}%" cy="{y}" r="11"><title>{title}</title></circle>'
            '<text class="inside mid" x="{x:.3f}%" y="{below}">{number}</text>'
        ).format(
            x=x.at(dot.size),
            y=_up(y, dot.point),
            below=_up(y, dot.point) + 4.5,
            number=number,
            title=_described(dot),
        )
    )
    if others:
        also = Markup('<text class="also" x="{:.3f}%" dx="16" y="{}">{}</text>')
        parts.append(also.format(x.at(dot.size), _up(y, dot.point) + 4.5, ", ".join(map(str, others))))
    return Markup("").join(parts)
