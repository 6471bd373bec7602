"""Gate: verdict on retention and greedy agreement, with the recipe's confidence."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.evaluation.retention import Comparison
from llmprune.evaluation.statistics import samples_needed
from llmprune.recipe.evaluation import Gate
from llmprune.results.figures.evaluation import (
    AgreementFigures,
    BarFigures,
    GateFigures,
    Interval,
    RetentionFigures,
    TaskFigures,
    Verdict,
)
from llmprune.results.formatting import plural

MEAN, GREEDY_AGREEMENT = "mean", "greedy agreement"
_NAMED = 3  # tasks listed with their reasons


@dataclass(frozen=True)
class _Found:
    """Measured value of a bar: a retention, or the greedy agreement."""

    value: float | None
    interval: Interval | None
    samples: int

    @classmethod
    def retention_of(cls, figures: TaskFigures | RetentionFigures | None) -> _Found | None:
        """Return the retention of a task, a group or the mean."""
        return cls(figures.retention, figures.interval, figures.samples) if figures else None


def judge(
    gate: Gate | None, comparison: Comparison, *, agreement: AgreementFigures | None = None
) -> GateFigures | None:
    """Return the gate's verdict; None without a gate.

    A bar is passed if the lower end of the interval reaches it, and failed if the upper end does not; otherwise there
    are not enough samples. The gate is passed if every bar is passed, and failed if any is failed. A bar without an
    interval leaves the gate undecided, with the reason.
    """
    if gate is None:
        return None
    bars = _bars(gate, comparison, agreement=agreement)
    verdicts = {bar.verdict for bar in bars}
    worst: tuple[Verdict, ...] = ("fail", "no interval", "not enough samples", "pass")
    verdict = next(candidate for candidate in worst if candidate in verdicts)
    return GateFigures(
        min_retention=gate.min_retention,
        retention=comparison.mean.retention if comparison.mean else None,
        confidence=gate.confidence,
        passed=verdict == "pass",
        verdict=verdict,
        bars=tuple(bars),
    )


def _bars(gate: Gate, comparison: Comparison, *, agreement: AgreementFigures | None) -> list[BarFigures]:
    """Return the gate's bars with their verdicts: mean retention, greedy agreement, tasks."""
    bars = []
    if gate.min_retention is not None:
        bars.append(
            _judge_bar(
                MEAN,
                gate.min_retention,
                found=_Found.retention_of(comparison.mean),
                confidence=gate.confidence,
                no_interval=_why_no_mean(comparison),
            )
        )
    if gate.min_greedy_agreement is not None:
        found = _Found(agreement.share, agreement.interval, agreement.samples) if agreement else None
        bar = _judge_bar(
            GREEDY_AGREEMENT,
            gate.min_greedy_agreement,
            found=found,
            confidence=gate.confidence,
            no_interval="it was not measured",
        )
        bars.append(bar.model_copy(update={"kind": GREEDY_AGREEMENT}))
    for name, min_retention in gate.per_task.items():
        task = comparison.named(name)
        bars.append(
            _judge_bar(
                name,
                min_retention,
                found=_Found.retention_of(task),
                confidence=gate.confidence,
                no_interval=_why_no_interval(name, task, comparison=comparison),
            )
        )
    return bars


def _judge_bar(
    name: str,
    minimum: float,
    *,
    found: _Found | None,
    confidence: float,
    no_interval: str,
) -> BarFigures:
    """Return a bar with its verdict. ``no_interval``: reason if there is no interval."""
    bar = BarFigures(
        name=name,
        minimum=minimum,
        measured=found.value if found else None,
        interval=found.interval if found else None,
        verdict="no interval",
        samples=found.samples if found else 0,
    )
    if bar.measured is None or bar.interval is None:
        return bar.model_copy(update={"reason": no_interval})
    if bar.interval.low >= minimum:
        return bar.model_copy(update={"verdict": "pass"})
    if bar.interval.high < minimum:
        return bar.model_copy(update={"verdict": "fail"})
    edge = bar.interval.low if bar.measured > minimum else bar.interval.high
    needed = samples_needed(bar.samples, bar.measured, edge=edge, bar=minimum, confidence=confidence)
    return bar.model_copy(update={"verdict": "not enough samples", "samples_needed": needed})


def _why_no_mean(comparison: Comparison) -> str:
    """Return why the mean over tasks has no interval."""
    if not comparison.tasks:
        return "no task was evaluated"
    named, others = comparison.tasks[:_NAMED], comparison.tasks[_NAMED:]
    reasons = [f"{task.task}: {_why_no_interval(task.task, task, comparison=comparison)}" for task in named]
    return "; ".join([*reasons, *([f"and {plural(len(others), 'more task')}"] if others else [])])


def _why_no_interval(name: str, found: TaskFigures | None, *, comparison: Comparison) -> str:
    """Return why a task or group has no interval."""
    if found is None:
        metrics = [f"{task.task} {task.metric}" for task in comparison.members(name)]
        if not metrics:
            return "it was not evaluated"
        return f"its tasks have different metrics ({', '.join(metrics)}), so they have no common score"
    if found.retention is None:
        return f"dense {found.dense:.4g} and pruned {found.pruned:.4g} have no ratio"
    return "its metric is not a mean over samples, so it has no interval"
