"""How figures are written for people, the same on the page and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from llmprune.common.schema import format_count, format_size
from llmprune.results.evaluation_figures import (
    BarFigures,
    GateFigures,
    Interval,
    SpeedFigures,
    TaskFigures,
    Verdict,
)
from llmprune.results.schema import BaseFiles, SparsityFigures, StabilityFigures

NOTHING = "–"  # a figure that does not exist
UNMEASURED = (
    "Nothing was evaluated, so what the pruning lost is not known. "
    "Add evaluation.perplexity or evaluation.tasks to the recipe to measure it."
)
_MOST_NAMES = 30  # of files in one sentence


def number(value: float | None) -> str:
    """Four digits that mean something: ``0.4312``, ``15.21``, ``1,204``; tiny values as ``3.1e-05``."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return _minus(f"{value:.2g}")
    if abs(float(f"{value:.4g}")) >= 1000 or float(value).is_integer():
        return _minus(f"{value:,.0f}")
    return _minus(f"{value:.4g}")


def fixed(value: float | None, digits: int = 3) -> str:
    """``0.412``: so many decimals that a column lines up, unless they would say too little or too much."""
    if value is None or not math.isfinite(value) or 0 < abs(value) < 10**-digits or abs(round(value, digits)) >= 100:
        return number(value)
    return _minus(f"{value:.{digits}f}")


def count(value: float | None) -> str:
    """``134.5 M``, ``27``."""
    return NOTHING if value is None else format_count(value)


def weight(value: float | None) -> str:
    """``269 MB``."""
    return NOTHING if value is None else format_size(value)


def percent(value: float | None, digits: int = 1) -> str:
    """``93.1%`` from 0.931."""
    if value is None or not math.isfinite(value):
        return number(value)
    return _minus(f"{value:,.{digits}%}")


def share(dense: float | None, pruned: float | None) -> float | None:
    """Pruned / dense; None where either is unknown or dense is 0."""
    return pruned / dense if dense and pruned is not None else None


def change(dense: float | None, pruned: float | None) -> str:
    """``−31.0%``: by how much pruned differs from dense."""
    ratio = share(dense, pruned)
    if ratio is None:
        return NOTHING
    if not math.isfinite(ratio):
        return number(ratio)
    text = f"{ratio - 1:+,.1%}".replace("-", "−")
    return "0%" if text[1:] == "0.0%" else text


def _minus(written: str) -> str:
    """With a real minus sign, and none before a zero."""
    return written.replace("-", "−" if any(digit in written for digit in "123456789") else "")


def if_changed(dense: int | None, pruned: int | None) -> tuple[int | None, int | None]:
    """Both figures where they differ; of what was left as it is, none."""
    return (dense, pruned) if dense != pruned else (None, None)


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ranges(indices: Sequence[int]) -> str:
    """``3, 20–22``: runs of three or more drawn together."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def width_names(widths: Mapping[str, int]) -> dict[str, str]:
    """What each width is called, by its config field: the only one simply MLP width."""
    return dict.fromkeys(widths, "MLP width") if len(widths) == 1 else {field: field for field in widths}


def times(ratio: float | None) -> str:
    """``1.18×``."""
    return NOTHING if ratio is None else f"{ratio:.2f}×"


def speedup(speed: SpeedFigures) -> float | None:
    """Pruned / dense of the tokens per second that are shown: the one factor of speed, wherever it stands."""
    return share(speed.dense, speed.pruned)


def describe_speedup(speed: SpeedFigures) -> str:
    """``1.15–1.27× over 3 pairs of runs``: how far the factor varies."""
    return f"{speed.ratio_low:.2f}–{times(speed.ratio_high)} over {plural(speed.repeats, 'pair')} of runs"


def plural(number_of: int, noun: str, *, many: str | None = None) -> str:
    """``1 layer``, ``1,024 layers``, ``7 matrices``."""
    return f"{number_of:,} {noun if number_of == 1 else many or f'{noun}s'}"


def describe_carried(files: BaseFiles) -> str:
    """The files of the base that come along, by name."""
    return _few(files.carried)


def describe_left(files: BaseFiles) -> str:
    """The files of the base that stay behind, each with the reason."""
    return _few([f"{name} ({reason})" for name, reason in files.left.items()])


def _few(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_NAMES
    return ", ".join(texts[:_MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def describe_sparsity(found: SparsityFigures) -> str:
    """What was counted in the saved file."""
    said = (
        f"{found.pattern} by {found.method}: {found.zeros:,} of the {found.weights:,} weights in "
        f"{plural(found.matrices, 'matrix', many='matrices')} are zero"
    )
    if found.groups:
        said += f"; all {found.groups:,} groups were counted in the saved file, {found.violations:,} break the pattern"
    return f"{said}. Zeros are stored: the file is not smaller, and only kernels for the pattern run it faster."


def agreement(stability: StabilityFigures) -> list[str]:
    """What the calibration check found, a sentence for each kind of thing that goes."""
    kinds = {
        "layers": stability.layers,
        "neurons": stability.neurons,
        "attention heads": stability.heads,
        "experts": stability.experts,
    }
    return [
        f"of the {kind} that one half of the calibration removes, the other removes {percent(found.mean)}"
        + (f" (in the worst layer {percent(found.least)})" if found.least < found.mean else "")
        + f"; by chance {percent(found.by_chance)}"
        for kind, found in kinds.items()
        if found is not None
    ]


def span(interval: Interval | None, digits: int = 1) -> str:
    """``91.2–96.4%``: where a share lies."""
    if interval is None:
        return NOTHING
    return f"{interval.low * 100:.{digits}f}–{percent(interval.high, digits)}"


def certainty(confidence: float) -> str:
    """``95%``, ``97.5%``: a confidence with all its digits."""
    return f"{round(confidence * 100, 6):.8g}%"


def interval_name(intervals: Iterable[Interval | None]) -> str:
    """What the intervals are called, by their confidence."""
    return interval_of(one.confidence for one in intervals if one is not None)


def interval_of(confidences: Iterable[float]) -> str:
    """``95% interval``; ``90% or 95% interval`` of several runs; ``interval`` where there is none."""
    found = sorted(set(confidences))
    return " or ".join(certainty(confidence) for confidence in found) + " interval" if found else "interval"


def metric_name(task: TaskFigures) -> str:
    """``acc``; ``wer, lower is better``."""
    return task.metric if task.higher_is_better else f"{task.metric}, lower is better"


def probability(value: float | None) -> str:
    """``0.031``, ``<0.001``; 1 where it is exactly that."""
    if value is None:
        return NOTHING
    return "1" if value == 1 else "<0.001" if value < 0.001 else f"{value:.3f}"


def describe_bar(bar: BarFigures, digits: int = 1) -> str:
    """``mean retention 93.1% (90.2–95.9%), at least 95% asked for: not enough samples, about 2,400 would tell``."""
    whose = "mean retention" if bar.name == "mean" else f"{bar.name} retention"
    within = f" ({span(bar.interval, digits)})" if bar.interval else ""
    reached = "unknown" if bar.retention is None else percent(bar.retention, digits)
    said = f"{whose} {reached}{within}, at least {percent(bar.min_retention, digits)} asked for"
    if bar.verdict == "not enough samples":
        enough = f"about {bar.samples_needed:,} would tell" if bar.samples_needed else "no number in reach would tell"
        few = "1 sample is" if bar.samples == 1 else f"{bar.samples:,} samples are"
        return f"{said}: {few} not enough, {enough}"
    if bar.verdict == "no interval":
        return f"{said}: {bar.reason or 'it has no interval'}"
    return said


_REMEDIES: dict[Verdict, str] = {
    "fail": "prune less, or calibrate with more text",
    "not enough samples": "evaluate more samples (raise evaluation.limit; of a finished run: llmprune reevaluate), "
    "name more tasks, or lower the bar",
    "no interval": "judge by a metric that is a mean over samples, the same for all tasks of a group "
    "(evaluation.metrics), or by tasks that the dense model scores above zero, or leave the bar out",
    "pass": "",
}


def describe_verdict(gate: GateFigures) -> str:
    """The bars that were not cleared, and what to do."""
    missed = [describe_bar(bar, 2) for bar in gate.bars if bar.verdict != "pass"]
    head = "the gate is not met" if gate.verdict == "fail" else "the gate is undecided"
    return f"{head}: {'; '.join(missed)}; {_REMEDIES[gate.verdict]}"
