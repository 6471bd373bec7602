"""Figures as text for people: the same figure reads alike in tables, on pages and on model cards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llmprune.common.schema import format_count, format_scaled, format_size
from llmprune.results.figures.evaluation import Interval, SpeedFigures, TaskFigures
from llmprune.results.figures.recovery import RecoveryScore

NOTHING = "–"  # placeholder for a missing figure


def number(value: float | None) -> str:
    """Format four significant digits: ``0.4312``, ``15.21``, ``1,204``; tiny values as ``3.1e-05``."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return _with_minus_sign(f"{value:.2g}")
    if abs(float(f"{value:.4g}")) >= 1000 or float(value).is_integer():
        return _with_minus_sign(f"{value:,.0f}")
    return _with_minus_sign(f"{value:.4g}")


def fixed(value: float | None, digits: int = 3) -> str:
    """Format with fixed decimals, such as ``0.412``, so that columns align.

    Values that would round to zero and values of 100 or more are formatted by ``number``.
    """
    if value is None or not math.isfinite(value) or 0 < abs(value) < 10**-digits or abs(round(value, digits)) >= 100:
        return number(value)
    return _with_minus_sign(f"{value:.{digits}f}")


def count(value: float | None) -> str:
    """Format a count: ``134.5 M``, ``27``."""
    return NOTHING if value is None else format_count(value)


def byte_size(value: float | None) -> str:
    """Format a number of bytes: ``269 MB``."""
    return NOTHING if value is None else format_size(value)


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share as a percentage: ``93.1%`` from 0.931."""
    if value is None or not math.isfinite(value):
        return number(value)
    return _with_minus_sign(f"{value:,.{digits}%}")


def share(dense: float | None, pruned: float | None) -> float | None:
    """Return pruned / dense; None if either is unknown or dense is 0."""
    return pruned / dense if dense and pruned is not None else None


def change(dense: float | None, pruned: float | None) -> str:
    """Format the relative difference of pruned from dense: ``−31.0%``."""
    ratio = share(dense, pruned)
    if ratio is None:
        return NOTHING
    if not math.isfinite(ratio):
        return number(ratio)
    text = f"{ratio - 1:+,.1%}".replace("-", "−")
    return "0%" if text[1:] == "0.0%" else text


def times(ratio: float | None) -> str:
    """Format a factor: ``1.18×``."""
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def speedup(speed: SpeedFigures) -> float | None:
    """Return pruned / dense of the displayed tokens per second, so that the factor agrees with the speeds shown."""
    return share(speed.dense, speed.pruned)


def duration(seconds: float) -> str:
    """Format a duration: ``0.42 s``, ``12.3 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def energy(kilowatt_hours: float) -> str:
    """Format an energy: ``0.71 Wh``, ``1.84 kWh``."""
    return format_scaled(kilowatt_hours * 1000, ("Wh", "kWh", "MWh"))


def ranges(indices: Sequence[int]) -> str:
    """Format indices, runs of three or more as a range: ``3, 20–22``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def plural(number_of: int, noun: str, *, many: str | None = None) -> str:
    """Format a number with its noun: ``1 layer``, ``1,024 layers``, ``7 matrices``."""
    return f"{number_of:,} {noun if number_of == 1 else many or f'{noun}s'}"


def as_sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def short_model_name(model: str) -> str:
    """Return the last part of a hub id, path or address, without ``.gguf``."""
    return model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf") or model


def span(interval: Interval | None, digits: int = 1) -> str:
    """Format an interval of shares: ``91.2–96.4%``."""
    if interval is None:
        return NOTHING
    return f"{interval.low * 100:.{digits}f}–{percent(interval.high, digits)}"


def interval_name(intervals: Iterable[Interval | None]) -> str:
    """Return a heading for intervals, as ``interval_heading`` does for their confidences."""
    return interval_heading(interval.confidence for interval in intervals if interval is not None)


def interval_heading(confidences: Iterable[float]) -> str:
    """Return ``95% interval``; ``90% or 95% interval`` for several confidences; ``interval`` for none."""
    found = sorted(set(confidences))
    return (
        " or ".join(f"{round(confidence * 100, 6):.8g}%" for confidence in found) + " interval" if found else "interval"
    )


def metric_name(task: TaskFigures | RecoveryScore) -> str:
    """Return the metric with its direction: ``acc``; ``wer, lower is better``."""
    return task.metric if task.higher_is_better else f"{task.metric}, lower is better"


def probability(value: float | None) -> str:
    """Format a p-value: ``0.031``, ``<0.001``; ``1`` only for exactly 1."""
    if value is None:
        return NOTHING
    return "1" if value == 1 else "<0.001" if value < 0.001 else f"{value:.3f}"


def _with_minus_sign(text: str) -> str:
    """Replace the hyphen by a minus sign; a zero has none."""
    return text.replace("-", "−" if any(digit in text for digit in "123456789") else "")
