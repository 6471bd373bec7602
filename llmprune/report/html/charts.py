"""Charts of a report as inline SVG without script.

Horizontal positions are percentages and vertical positions pixels, so a chart adapts to the width of the page and its
text keeps one size. Colours come from the page's CSS classes. Every distinction by colour is repeated by a hatching, a
dash or a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.results.figures.layers import LayerFigures
from llmprune.results.formatting import number, plural, ranges

TOP, PLOT, BOTTOM = 30, 190, 34  # pixels: heading of the axis, plot area, layer numbers
MOST_MARKERS = 40  # with more layers, dots on the lines and crosses below them would touch


@dataclass(frozen=True)
class Bar:
    """Bar of a bar chart; ``kind`` is its CSS class: dense, cut or pruned."""

    label: str
    value: float
    kind: str


@dataclass(frozen=True)
class Axis:
    """Vertical axis, which maps values to pixels."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    height: int = PLOT  # of the plot in pixels

    def y(self, value: float) -> float:
        """Return the distance from the top of the chart in pixels."""
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(TOP + self.height * (1 - share), 1)

    @property
    def base(self) -> float:
        """Position of the bars' base in pixels from the top."""
        return self.y(self.low if self.log else 0.0)


def importance_chart(layers: Sequence[LayerFigures]) -> Markup | None:
    """Draw the importance of each layer as a bar, removed layers on a hatched background. None without scores."""
    scored = [
        (place, layer, layer.importance)
        for place, layer in enumerate(layers)
        if layer.importance is not None and math.isfinite(layer.importance)
    ]
    if not scored:
        return None
    values = [value for *_, value in scored]
    axis = _bar_axis(values)
    body = [
        _removed_backgrounds(layers, "importance"),
        grid(axis, "importance, log scale" if axis.log else "importance"),
        *(
            _layer_bar(place / len(layers), 1 / len(layers), layer=layer, value=value, axis=axis)
            for place, layer, value in scored
        ),
        _layer_numbers(layers),
    ]
    text = (
        f"One bar for each of {plural(len(scored), 'layer')}, from {number(min(values))} to "
        f"{number(max(values))}. {_removed_sentence(layers)}"
    )
    return svg("importance", "Importance of each layer", text=text, height=TOP + PLOT + BOTTOM, body=body)


def error_chart(layers: Sequence[LayerFigures]) -> Markup | None:
    """Draw the relative error of the hidden states after each layer, before its own refit and as saved.

    None if no error was measured.
    """
    lines = {
        kind: [(place, value) for place, value in enumerate(errors) if value is not None and math.isfinite(value)]
        for kind, errors in (
            ("cut", [layer.error_cut for layer in layers]),
            ("pruned", [layer.error_refit for layer in layers]),
        )
    }
    values = [value for points in lines.values() for _, value in points]
    if not values:
        return None
    axis = linear_axis(values)
    body = [_removed_backgrounds(layers, "error"), grid(axis, "relative error")]
    body += [_line(points, kind, axis=axis, slots=len(layers)) for kind, points in lines.items()]
    body.append(_layer_numbers(layers))
    names = {"cut": "before its own refit", "pruned": "as saved"}
    ends = [f"{names[kind]} {number(points[-1][1])}" for kind, points in lines.items() if points]
    text = f"Lines along depth. At the last layer measured: {', '.join(ends)}. {_removed_sentence(layers)}"
    return svg(
        "error", "Relative error of the hidden states along depth", text=text, height=TOP + PLOT + BOTTOM, body=body
    )


def bar_chart(name: str, title: str, *, bars: Sequence[Bar], write: Callable[[float], str] = number) -> Markup:
    """Draw horizontal bars from zero, with label and value above each; ``name`` makes the ids unique."""
    longest = max((bar.value for bar in bars if math.isfinite(bar.value)), default=0) or 1
    body = []
    for row, bar in enumerate(bars):
        share = min(max(bar.value / longest, 0), 1) if math.isfinite(bar.value) else 1
        body.append(
            Markup(
                '<text class="name" x="0" y="{y}">{label}</text>'
                '<text class="value end" x="100%" y="{y}">{value}</text>'
                '<rect class="track" x="0" y="{top}" width="100%" height="10"/>'
                '<rect class="{kind}" x="0" y="{top}" width="{share:.2f}%" height="10"/>'
            ).format(
                y=row * 46 + 15,
                top=row * 46 + 23,
                label=bar.label,
                value=write(bar.value),
                kind=bar.kind,
                share=max(share * 100, 0.4),
            )
        )
    text = "; ".join(f"{bar.label}: {write(bar.value)}" for bar in bars)
    return svg(name, title, text=text, height=len(bars) * 46 - 10, body=body)


def svg(name: str, title: str, *, text: str, height: float, body: Iterable[Markup], role: str = "img") -> Markup:
    """Return the drawing with its title and text description; ``name`` makes the ids unique.

    ``role``: in the accessibility tree; "group" where parts of the drawing are links.
    """
    return Markup(
        '<svg class="chart" role="{role}" aria-labelledby="{name}-title {name}-desc" '
        'width="100%" height="{height}">'
        '<title id="{name}-title">{title}</title><desc id="{name}-desc">{text}</desc>{body}</svg>'
    ).format(name=name, role=role, title=title, text=text, height=height, body=Markup("").join(body))


def _layer_bar(left: float, width: float, *, layer: LayerFigures, value: float, axis: Axis) -> Markup:
    """Draw one layer's bar, at least a pixel high; ``left`` and ``width`` of its slot are shares of the chart."""
    top, bottom = sorted((axis.y(value), axis.base))
    return Markup('<rect class="{}" x="{:.3%}" y="{}" width="{:.3%}" height="{}"><title>{}</title></rect>').format(
        "cut" if layer.removed else "kept",
        left + 0.14 * width,
        top,
        0.72 * width,
        max(round(bottom - top, 1), 1),
        f"Layer {layer.layer}: {number(value)}" + (", removed" if layer.removed else ""),
    )


def _line(points: Sequence[tuple[int, float]], kind: str, *, axis: Axis, slots: int) -> Markup:
    """Draw a line over the layers, with a dot per layer if they do not touch."""
    path = " ".join(f"{place + 0.5},{axis.y(value) - TOP}" for place, value in points)
    line = Markup(
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 {} {}" preserveAspectRatio="none" '
        'overflow="visible"><polyline class="line {}" points="{}"/></svg>'
    ).format(TOP, PLOT, slots, PLOT, kind, path)
    if slots > MOST_MARKERS:
        return line
    dot = Markup('<circle class="dot {}" cx="{:.3f}%" cy="{}" r="2.6"/>')
    return line + Markup("").join(
        dot.format(kind, (place + 0.5) * 100 / slots, axis.y(value)) for place, value in points
    )


def _removed_backgrounds(layers: Sequence[LayerFigures], name: str) -> Markup:
    """Draw a hatched background over the whole height for each removed layer."""
    background = Markup('<rect class="ground" x="{:.3f}%" y="{}" width="{:.3f}%" height="{}" fill="url(#{}-hatch)"/>')
    width = 100 / len(layers)
    return _hatching(name) + Markup("").join(
        background.format(place * width, TOP, width, PLOT, name) for place, layer in enumerate(layers) if layer.removed
    )


def _hatching(name: str) -> Markup:
    return Markup(
        '<defs><pattern id="{}-hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="hatch-back" width="5" height="5"/>'
        '<rect class="hatch-stroke" width="1.6" height="5"/></pattern></defs>'
    ).format(name)


def grid(axis: Axis, heading: str) -> Markup:
    """Draw a line with its number at each tick, and the heading of the axis."""
    line = Markup('<line class="{}" x1="0" x2="100%" y1="{y}" y2="{y}"/><text class="tick end" x="-8" y="{}">{}</text>')
    rows = [
        line.format("zero" if axis.y(tick) == axis.base else "grid", axis.y(tick) + 4, number(tick), y=axis.y(tick))
        for tick in axis.ticks
    ]
    return Markup('<text class="tick" x="-44" y="12">{}</text>').format(heading) + Markup("").join(rows)


def _layer_numbers(layers: Sequence[LayerFigures]) -> Markup:
    """Draw layer numbers below the plot, at most seven, and a cross below each removed layer."""
    step = next(step for step in _steps() if len(layers) / step <= 7)
    y = TOP + PLOT
    mark = Markup('<text class="{} mid" x="{:.3f}%" y="{}">{}</text>')
    marks = []
    for place, layer in enumerate(layers):
        x = (place + 0.5) * 100 / len(layers)
        if place % step == 0:
            marks.append(mark.format("tick", x, y + 27, layer.layer))
        if layer.removed and len(layers) <= MOST_MARKERS:
            marks.append(mark.format("cross", x, y + 12, "×"))
    return Markup("").join(marks) + Markup('<text class="tick" x="-44" y="{}">layer</text>').format(y + 27)


def _removed_sentence(layers: Sequence[LayerFigures]) -> str:
    removed = [layer.layer for layer in layers if layer.removed]
    return f"Removed: {'layer' if len(removed) == 1 else 'layers'} {ranges(removed)}." if removed else "None removed."


def _bar_axis(values: Sequence[float]) -> Axis:
    """Return a linear axis, or a logarithmic one if the largest value is far above the median."""
    middle = sorted(values)[len(values) // 2]
    if min(values) > 0 and max(values) > 8 * middle:
        return log_axis(min(values) * 0.7, max(values) * 1.15)
    return linear_axis(values)


def linear_axis(values: Sequence[float]) -> Axis:
    """Return an axis from zero over all values."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    if high - low < 1e-300:
        high = low + 1
    ticks = linear_ticks(low, high, parts=4)
    return Axis(ticks[0], ticks[-1], ticks)


def linear_ticks(low: float, high: float, *, parts: int) -> tuple[float, ...]:
    """Return round values at equal steps, from at most ``low`` to at least ``high``, in about ``parts`` steps."""
    step = _round_up((high - low) / parts) if high > low else 1.0
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(index * step for index in range(first, max(last, first + 1) + 1))


def log_axis(low: float, high: float) -> Axis:
    """Return a logarithmic axis between two positive values, with about six ticks."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = tuple(
            value for power in decades for digit in digits if low <= (value := float(f"{digit}e{power}")) <= high
        )
        if len(ticks) >= 3:
            break
    return Axis(low, high, ticks[:: math.ceil(len(ticks) / 6)] if ticks else (), log=True)


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= value * 0.999)


def _steps() -> Iterable[int]:
    """Yield 1, 2, 5, 10, 20, 50, …"""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def swatch(kind: str) -> Markup:
    """Draw the symbol of a legend entry."""
    drawings = {
        "kept": '<rect class="kept" x="4" y="1" width="10" height="12"/>',
        "removed": '<rect x="0" y="0" width="18" height="14" fill="url(#importance-hatch)"/>'
        '<rect class="cut" x="4" y="5" width="10" height="9"/>',
        "cut": '<line class="line cut" x1="0" x2="18" y1="7" y2="7"/><circle class="dot cut" cx="9" cy="7" r="2.6"/>',
        "pruned": '<line class="line pruned" x1="0" x2="18" y1="7" y2="7"/>'
        '<circle class="dot pruned" cx="9" cy="7" r="2.6"/>',
    }
    return Markup('<svg class="swatch" width="18" height="14" aria-hidden="true">{}</svg>').format(
        Markup(drawings[kind])
    )
