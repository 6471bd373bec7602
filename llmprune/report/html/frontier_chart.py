"""Chart of a search: size, or speed, of each tried shape against its divergence, with the frontier.

As in ``charts``, horizontal positions are percentages and vertical positions pixels. Smaller and faster is further
left, so no shape lies below and left of the frontier: names stand there. Markers and colours both tell the kind of a
shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from llmprune.report.html.charts import TOP, Axis, grid, linear_axis, linear_ticks, log_axis, svg
from llmprune.results.figures.search import ChosenShape, SearchFigures, TriedShape
from llmprune.results.formatting import count, fixed, percent, share, times
from llmprune.results.sentences.search import AXES

PLOT, _FOOT = 300, 46  # pixels: plot area; ticks, and the name of the axis
_NAME_HEIGHT, _NAME_WIDTH = 15, 27  # of a name: pixels, and percent of the width of the plot
_WIDTH = 1000  # of the line's coordinates
_LOG_FROM = 5  # ratio of the highest to the lowest value from which the axis is logarithmic
_LEFT_ROOM, _RIGHT_ROOM = 0.3, 0.06  # of the range of the sizes: names lie left of their shapes

Link = Callable[[TriedShape], str]


@dataclass(frozen=True)
class Measure:
    """Cost of a shape: its size, or its slowness. ``cost``: value on the axis, smaller is further left."""

    name: str
    axis: str
    cost: Callable[[TriedShape], float]
    frontier: Callable[[SearchFigures], tuple[TriedShape, ...]]
    write: Callable[[float], str]  # a tick
    limit: Callable[[ChosenShape], float | None]  # of the budget, as a cost


SIZE = Measure(
    "frontier",
    "parameters",
    lambda one: one.parameters,
    lambda found: found.frontier,
    count,
    lambda chosen: chosen.limits.get("parameters"),
)
SPEED = Measure(
    "speed-frontier",
    "predicted speed, of the dense model's; faster to the left",
    lambda one: -(one.speed or 0.0),
    lambda found: found.speed_frontier,
    lambda cost: times(-cost),
    lambda chosen: -chosen.limits["speed"] if "speed" in chosen.limits else None,
)


def frontier_chart(found: SearchFigures, measure: Measure = SIZE, *, link: Link | None = None) -> Markup | None:
    """Draw all tried shapes. None without a shape that has finite figures. ``link``: address behind each shape."""
    shapes = [one for one in found.tried if math.isfinite(one.score) and (measure is SIZE or one.speed is not None)]
    if not shapes:
        return None
    line = [one for one in measure.frontier(found) if math.isfinite(one.score)]
    costs = [measure.cost(one) for one in shapes]
    plot = _Plot(
        measure,
        axis=_axis([one.score for one in shapes if one.broken is None] or [one.score for one in shapes]),
        low=min(costs),
        high=max(costs),
    )
    best = {(found.chosen[size].name, size) for size in range(len(found.chosen))}
    rank = {_key(one): 0 for one in shapes} | {_key(one): 1 for one in line} | dict.fromkeys(best, 2)
    body = [
        grid(plot.axis, "score, log scale" if plot.axis.log else "score"),
        *(_limit(plot, limit) for limit in dict.fromkeys(map(measure.limit, found.chosen)) if limit is not None),
        _line(plot, line),
        _names(plot, line, best=best),
        *(
            _shape(plot, one, found=found, rank=rank[_key(one)], link=link)
            for one in sorted(shapes, key=lambda one: rank[_key(one)])
        ),
        _ticks(plot),
    ]
    named = "; ".join(f"{one.name}: {_place(found, one)}" for one in line)
    role = "img" if link is None else "group"
    title = f"{'Size' if measure is SIZE else 'Speed'} of the tried shapes against their divergence"
    return svg(measure.name, title, text=f"On the frontier: {named}.", height=TOP + PLOT + _FOOT, body=body, role=role)


def marker(kind: str) -> Markup:
    """Draw the marker of a legend entry: frontier, chosen, candidate, single, further, broken."""
    mark = {"frontier": "circle on", "chosen": "circle best", "candidate": "circle"}.get(kind, kind)
    return Markup(
        '<svg class="swatch" width="18" height="16" aria-hidden="true"><g transform="translate(9 8)">{}</g></svg>'
    ).format(_mark(mark))


@dataclass(frozen=True)
class _Plot:
    """Axes of the chart; ``low``, ``high``: of the costs."""

    measure: Measure
    axis: Axis
    low: float
    high: float

    def x(self, cost: float) -> float:
        """Return the distance from the left as a percentage."""
        left, right = self.ends
        return 100 * (cost - left) / (right - left)

    @property
    def ends(self) -> tuple[float, float]:
        """Costs at the left and at the right end."""
        room = (self.high - self.low) or abs(self.high) * 0.05 or 1.0
        return self.low - _LEFT_ROOM * room, self.high + _RIGHT_ROOM * room


def _axis(values: Sequence[float]) -> Axis:
    """Return an axis with room for names below the lowest value."""
    low, high = min(values), max(values)
    if low > 0 and high > _LOG_FROM * low:
        return replace(log_axis(low * (low / high) ** 0.3, high * 1.1), height=PLOT)
    return replace(linear_axis(values), height=PLOT)


def _key(one: TriedShape) -> tuple[str, int]:
    return one.name, one.size


def _line(plot: _Plot, line: Sequence[TriedShape]) -> Markup:
    """Draw the frontier as steps: the least divergence that can be had within each size."""
    points: list[tuple[float, float]] = []
    for one in reversed(line):  # from the smallest
        x, y = plot.x(plot.measure.cost(one)), plot.axis.y(one.score)
        points += [(x, points[-1][1]), (x, y)] if points else [(x, y)]
    path = " ".join(f"{x * _WIDTH / 100:.1f},{y - TOP:.1f}" for x, y in points)
    return Markup(
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none" '
        'overflow="visible"><polyline class="line pruned" points="{}"/></svg>'
    ).format(TOP, PLOT, _WIDTH, PLOT, path)


def _limit(plot: _Plot, limit: float) -> Markup:
    """Draw a vertical line at the limit of a budget, where it lies in the plot."""
    left, right = plot.ends
    if not left < limit < right:
        return Markup("")
    x = plot.x(limit)
    return Markup(
        '<line class="saved" x1="{x:.2f}%" x2="{x:.2f}%" y1="{}" y2="{}"/>'
        '<text class="tick halo {}" x="{x:.2f}%" dx="{}" y="{}">budget</text>'
    ).format(TOP - 14, TOP + PLOT, *(("end", -6) if x > 50 else ("", 6)), TOP - 12, x=x)


def _shape(plot: _Plot, one: TriedShape, *, found: SearchFigures, rank: int, link: Link | None) -> Markup:
    """Draw the marker of a shape with its figures as a title, and as a link where there is an address."""
    if one.broken is not None:
        kind = "broken"
    elif one.further is not None:
        kind = "further"
    else:
        kind = "single" if len(found.axes(one)) == 1 else "circle"
    drawn = Markup('<svg class="point" x="{:.3f}%" y="{}" overflow="visible">{}<title>{}</title></svg>').format(
        plot.x(plot.measure.cost(one)),
        plot.axis.y(min(one.score, plot.axis.high)),  # a broken one may be beyond the axis
        _mark(f"{kind} {('', 'on', 'best on')[rank]}".strip()),
        f"{one.name}: {_place(found, one)}",
    )
    if link is None:
        return drawn
    return Markup('<a href="{}" aria-label="{}">{}</a>').format(
        link(one), f"Make {one.name} the recipe: {_place(found, one)}", drawn
    )


def _mark(kind: str) -> Markup:
    """Draw a marker around the origin; ``kind``: its form, and CSS classes."""
    paths = {
        "single": "M0-5.6 5.6 0 0 5.6-5.6 0z",
        "further": "M0-5.2 5 4-5 4z",
        "broken": "M-4-4 4 4M4-4-4 4",
    }
    ring = Markup('<circle class="ring" r="7.4"/>') if "best" in kind else Markup("")
    path = paths.get(kind.split()[0])
    form = Markup('<circle class="mark {}" r="4.4"/>') if path is None else Markup('<path class="mark {}" d="{}"/>')
    return ring + form.format(kind, path)


def _place(found: SearchFigures, one: TriedShape) -> str:
    """Return size, divergence and, where there is one, speed of a shape, and what is special about it."""
    said = [
        f"{count(one.parameters)} parameters ({percent(share(found.dense_parameters, one.parameters))})",
        f"score {fixed(one.score)}{' repaired' if one.repaired else ' as cut'}",
    ]
    said += [f"{times(one.speed)} the speed"] if one.speed is not None else []
    said += [f"broken on {one.broken}"] if one.broken is not None else []
    said += [f"one step further in {AXES[one.further]}"] if one.further is not None else []
    said += ["chosen"] if any(_key(one) == (best.name, size) for size, best in enumerate(found.chosen)) else []
    return ", ".join(said)


def _names(plot: _Plot, line: Sequence[TriedShape], *, best: set[tuple[str, int]]) -> Markup:
    """Draw the names of shapes on the frontier below and left of them: those of chosen shapes, and others with room."""
    placed: list[tuple[float, float, TriedShape]] = []

    def is_free(x: float, y: float) -> bool:
        return all(abs(x - left) >= _NAME_WIDTH or abs(y - top) >= _NAME_HEIGHT for left, top, _ in placed)

    for one in sorted(line, key=lambda one: _key(one) not in best):
        x, y = plot.x(plot.measure.cost(one)), plot.axis.y(one.score) + 14
        while _key(one) in best and not is_free(x, y):
            y += 1
        if is_free(x, y):
            placed.append((x, y, one))
    text = Markup('<text class="tick shape end halo{}" x="{:.3f}%" dx="-13" y="{:.1f}">{}</text>')
    return Markup("").join(text.format(" chosen" if _key(one) in best else "", x, y, one.name) for x, y, one in placed)


def _ticks(plot: _Plot) -> Markup:
    """Draw the numbers and the name of the horizontal axis."""
    left, right = plot.ends
    ticks = [tick for tick in linear_ticks(left, right, parts=5) if left < tick < right]
    mark = Markup('<text class="tick mid" x="{:.2f}%" y="{}">{}</text>')
    return Markup("").join(mark.format(plot.x(tick), TOP + PLOT + 20, plot.measure.write(tick)) for tick in ticks) + (
        Markup('<text class="tick end" x="100%" y="{}">{}</text>').format(TOP + PLOT + 40, plot.measure.axis)
    )
