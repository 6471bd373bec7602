"""The gate: whether enough was kept, with the confidence that was asked for."""

from __future__ import annotations

from llmprune.evaluation.retention import Comparison
from llmprune.evaluation.statistics import samples_needed
from llmprune.recipe.evaluation import Gate
from llmprune.results.evaluation_figures import BarFigures, GateFigures, RetentionFigures, TaskFigures, Verdict
from llmprune.results.formatting import plural

MEAN = "mean"
_NAMED = 3  # tasks whose reasons are given


def judge(gate: Gate | None, comparison: Comparison) -> GateFigures | None:
    """The verdict; None without a gate.

    A bar is passed where the lower end of the interval reaches it, failed where the upper end does not; between them
    there are not enough samples to tell. The gate passes where every bar is passed and fails where one is failed.
    A bar without an interval to judge by leaves the gate undecided, and says why it has none.
    """
    if gate is None:
        return None
    bars = [
        _judge_bar(
            MEAN,
            gate.min_retention,
            found=comparison.mean,
            confidence=gate.confidence,
            why_not=_why_no_mean(comparison),
        )
    ]
    for name, least in gate.per_task.items():
        task = comparison.named(name)
        bars.append(
            _judge_bar(
                name,
                least,
                found=task,
                confidence=gate.confidence,
                why_not=_why_no_interval(name, task, comparison=comparison),
            )
        )
    verdicts = {bar.verdict for bar in bars}
    worst: tuple[Verdict, ...] = ("fail", "no interval", "not enough samples", "pass")
    verdict = next(one for one in worst if one in verdicts)
    return GateFigures(
        min_retention=gate.min_retention,
        retention=comparison.mean.retention if comparison.mean else None,
        confidence=gate.confidence,
        passed=verdict == "pass",
        verdict=verdict,
        bars=tuple(bars),
    )


def _judge_bar(
    name: str, least: float, *, found: TaskFigures | RetentionFigures | None, confidence: float, why_not: str
) -> BarFigures:
    """Return a bar with its verdict. ``why_not``: the reason that is given where there is no interval."""
    bar = BarFigures(
        name=name,
        min_retention=least,
        retention=found.retention if found else None,
        interval=found.interval if found else None,
        verdict="no interval",
        samples=found.samples if found else 0,
    )
    if bar.retention is None or bar.interval is None:
        return bar.model_copy(update={"reason": why_not})
    if bar.interval.low >= least:
        return bar.model_copy(update={"verdict": "pass"})
    if bar.interval.high < least:
        return bar.model_copy(update={"verdict": "fail"})
    edge = bar.interval.low if bar.retention > least else bar.interval.high
    needed = samples_needed(bar.samples, bar.retention, edge=edge, bar=least, confidence=confidence)
    return bar.model_copy(update={"verdict": "not enough samples", "samples_needed": needed})


def _why_no_mean(comparison: Comparison) -> str:
    """Say why the mean over tasks has no interval."""
    if not comparison.tasks:
        return "no task was evaluated"
    named, others = comparison.tasks[:_NAMED], comparison.tasks[_NAMED:]
    reasons = [f"{task.task}: {_why_no_interval(task.task, task, comparison=comparison)}" for task in named]
    return "; ".join([*reasons, *([f"and {plural(len(others), 'more task')}"] if others else [])])


def _why_no_interval(name: str, found: TaskFigures | None, *, comparison: Comparison) -> str:
    """Say why a task or group has no interval."""
    if found is None:
        metrics = [f"{task.task} {task.metric}" for task in comparison.members(name)]
        if not metrics:
            return "it was not evaluated"
        return f"its tasks have different metrics ({', '.join(metrics)}), so they have no figure together"
    if found.retention is None:
        return f"dense {found.dense:.4g} and pruned {found.pruned:.4g} have no ratio"
    return "its metric is no mean over samples, so it has no interval"
