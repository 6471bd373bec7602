"""Charts of a job while it runs: its steps on a common axis of time, and small histories of what it uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.common.schema import format_size
from llmprune.common.time_left import rough_duration
from llmprune.results.formatting import duration
from llmprune.service.monitoring.run_progress import RunProgress, TimelineStep
from llmprune.service.monitoring.usage import JobUse

_LEAST_SHARE = 0.6  # percent of the axis that a step has at least, to be seen
_WIDTH, _HEIGHT = 240, 36  # of a history


@dataclass(frozen=True)
class TimelineRow:
    """Step with the words for its time and its bar. ``begin``, ``width``, ``done``: percent of the axis."""

    step: TimelineStep
    time: str
    begin: float
    width: float
    done: float


@dataclass(frozen=True)
class History:
    """History of one figure: its name, its last value in words, and its chart."""

    name: str
    now: str
    chart: Markup


def timeline_rows(progress: RunProgress) -> list[TimelineRow]:
    """Return the steps of a run with their bars."""
    lengths = [_length(step) for step in progress.steps]
    total = sum(lengths) or 1.0
    rows, begin = [], 0.0
    for step, length in zip(progress.steps, lengths, strict=True):
        share = 100 * length / total
        spent = min((step.seconds or 0.0) / length, 1.0) if length else 0.0
        width = min(max(share, _LEAST_SHARE), 100 - min(begin, 100 - _LEAST_SHARE))
        place = min(begin, 100 - _LEAST_SHARE)
        rows.append(TimelineRow(step, _time(step), round(place, 2), round(width, 2), round(width * spent, 2)))
        begin += share
    return rows


def histories(use: JobUse) -> list[History]:
    """Return the histories of the figures that were measured."""
    samples = use.samples
    found = [
        _history("Processors", [sample.cpu for sample in samples], shown=_percent),
        _history("Memory", [sample.memory for sample in samples], shown=format_size, limit=use.memory_limit),
        _history("Disk", [sample.disk for sample in samples], shown=format_size, limit=use.disk_quota),
    ]
    for name in dict.fromkeys(gpu.name for sample in samples for gpu in sample.gpus):
        gpus = [next((gpu for gpu in sample.gpus if gpu.name == name), None) for sample in samples]
        totals = [gpu.total for gpu in gpus if gpu and gpu.total]
        busy = [gpu.percent if gpu else None for gpu in gpus]
        memory = [gpu.memory if gpu else None for gpu in gpus]
        limit = totals[-1] if totals else None
        found.append(_history(f"GPU {name}", busy, shown=_percent, limit=100))
        found.append(_history(f"GPU {name} memory", memory, shown=format_size, limit=limit))
    return [one for one in found if one is not None]


def _length(step: TimelineStep) -> float:
    """Return the seconds of a step on the axis; 0 where they are not known."""
    spent, expected = step.seconds or 0.0, step.expected_seconds or 0.0
    return spent if step.state in ("done", "reused") else max(spent, expected)


def _time(step: TimelineStep) -> str:
    if step.state == "reused":
        return "kept"
    if step.state == "done":
        return duration(round(step.seconds or 0.0, 1))
    if step.state == "current":
        spent = rough_duration(step.seconds or 0.0)
        return f"{spent} of about {rough_duration(step.expected_seconds)}" if step.expected_seconds else spent
    return f"about {rough_duration(step.expected_seconds)}" if step.expected_seconds else "not known"


def _history(
    name: str, values: Sequence[float | int | None], *, shown: Callable[[int], str], limit: float | None = None
) -> History | None:
    """Return the history of a figure; None where it was never measured."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    last, most = shown(int(known[-1])), shown(int(max(known)))
    now = f"{last} of {shown(int(limit))}" if limit and limit != 100 else last
    described = f"{name}: now {now}, at most {most} so far"
    return History(name, f"{now}, at most {most}" if most != last else now, _chart(values, described, limit=limit))


def _chart(values: Sequence[float | int | None], described: str, *, limit: float | None) -> Markup:
    """Return a line chart of a figure over time, from 0 to its limit where the figure comes near to it."""
    known = [value for value in values if value is not None]
    top = max(known) * 1.1 or 1.0
    top = limit if limit and limit <= 4 * top else top
    step = _WIDTH / max(len(values) - 1, 1)
    points = [
        f"{index * step:.1f},{_HEIGHT - 2 - (_HEIGHT - 4) * min(value / top, 1.0):.1f}"
        for index, value in enumerate(values)
        if value is not None
    ]
    points = points if len(points) > 1 else [points[0], f"{_WIDTH},{points[0].split(',')[1]}"]
    first, last = points[0].split(",")[0], points[-1].split(",")[0]
    line = " ".join(points)
    return Markup(
        '<svg class="history" viewBox="0 0 {w} {h}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        '<polygon points="{first},{h} {line} {last},{h}"/><polyline points="{line}"/></svg>'
    ).format(w=_WIDTH, h=_HEIGHT, label=described, first=first, last=last, line=line)


def _percent(value: int) -> str:
    return f"{value} %"
