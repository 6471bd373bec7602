"""Results side by side: how small against how good, as a chart and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.service.job import Figures, JobSummary

WIDTH, HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 20, 48


@dataclass(frozen=True)
class Point:
    """One job on the chart: shares of the dense model, and its number in the table."""

    number: int
    name: str
    size: float
    kept: float


def kept_of(figures: Figures) -> float | None:
    """How good the result is as a share of dense: its mean task retention, else its perplexity's."""
    if figures.retention is not None:
        return figures.retention
    return figures.perplexity[0] / figures.perplexity[1] if figures.perplexity else None


def points_of(jobs: Sequence[JobSummary]) -> list[Point]:
    """The jobs that have both figures, numbered as in the table."""
    found = []
    for number, job in enumerate(jobs, start=1):
        kept = kept_of(job.figures) if job.figures else None
        if job.figures and kept is not None:
            found.append(Point(number, job.name, job.figures.bytes[1] / job.figures.bytes[0], kept))
    return found


def chart(points: Sequence[Point]) -> Markup:
    """An SVG of size (to the right: larger) against quality (upwards: better); the dense model is at 100 %, 100 %."""
    low_x, high_x = _range([point.size for point in points] + [1.0])
    low_y, high_y = _range([point.kept for point in points] + [1.0])

    def x(share: float) -> float:
        return round(_LEFT + (share - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(share: float) -> float:
        return round(HEIGHT - _BOTTOM - (share - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM), 1)

    parts = [
        Markup(
            '<svg class="scatter" viewBox="0 0 {} {}" role="img" aria-label="Size against quality, as shares of dense">'
        ).format(WIDTH, HEIGHT)
    ]
    for share in _ticks(low_y, high_y):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, WIDTH - _RIGHT, y(share), y(share)
            )
        )
        parts.append(
            Markup('<text class="tick end" x="{}" y="{}">{:.0%}</text>').format(_LEFT - 8, y(share) + 4, share)
        )
    for share in _ticks(low_x, high_x):
        parts.append(
            Markup('<text class="tick mid" x="{}" y="{}">{:.0%}</text>').format(x(share), HEIGHT - _BOTTOM + 20, share)
        )
    parts.append(
        Markup('<text class="tick mid" x="{}" y="{}">size of the weights, of dense</text>').format(
            (_LEFT + WIDTH - _RIGHT) // 2, HEIGHT - 6
        )
    )
    parts.append(
        Markup('<circle class="dense" cx="{}" cy="{}" r="6"><title>dense</title></circle>').format(x(1.0), y(1.0))
    )
    for point in points:
        parts.append(
            Markup(
                "<g><title>{}: {:.1%} of the size, {:.1%} kept</title>"
                '<circle class="pruned" cx="{}" cy="{}" r="11"/><text class="number" x="{}" y="{}">{}</text></g>'
            ).format(
                point.name,
                point.size,
                point.kept,
                x(point.size),
                y(point.kept),
                x(point.size),
                y(point.kept) + 4,
                point.number,
            )
        )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _range(shares: Sequence[float]) -> tuple[float, float]:
    """A little more than what is shown, in steps of 5 %."""
    low, high = min(shares), max(shares)
    return (int(low * 20) - 1) / 20, (int(high * 20) + 1) / 20


def _ticks(low: float, high: float) -> list[float]:
    """Round shares between two ends, at most seven or so."""
    step = next((step for step in (5, 10, 20, 25, 50, 100) if (high - low) * 100 / step <= 7), 1000)
    first, last = round(low * 100), round(high * 100)
    return [share / 100 for share in range(first + (-first) % step, last + 1, step)]
