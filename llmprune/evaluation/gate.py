"""The gate: whether enough was kept, with the confidence that was asked for."""

from __future__ import annotations

from llmprune.errors import EvaluationError
from llmprune.evaluation.retention import Comparison
from llmprune.evaluation.section import Gate
from llmprune.evaluation.statistics import samples_needed
from llmprune.report.value import BarFigures, GateFigures, Interval, Verdict

MEAN = "mean"


def judge(gate: Gate | None, comparison: Comparison) -> GateFigures | None:
    """The verdict; None without a gate.

    A bar is passed where the lower end of the interval reaches it, failed where the upper end does not; between them
    there are not enough samples to tell. The gate passes where every bar is passed and fails where one is failed.
    Raises EvaluationError where no task has a retention to judge.
    """
    if gate is None:
        return None
    if comparison.mean is None:
        raise EvaluationError(
            "evaluation.gate: no task has a retention to judge; "
            "name a task that the dense model scores above zero in evaluation.tasks, or remove the gate"
        )
    mean = comparison.mean
    bars = [_bar(MEAN, gate.min_retention, mean.retention, mean.interval, mean.samples, gate.confidence)]
    for name, least in gate.per_task.items():
        task = comparison.named(name)
        assert task is not None, "the names were checked when the tasks were loaded"
        bars.append(_bar(name, least, task.retention, task.interval, task.samples, gate.confidence))
    verdicts = {bar.verdict for bar in bars}
    worst: tuple[Verdict, ...] = ("fail", "no interval", "not enough samples", "pass")
    verdict = next(one for one in worst if one in verdicts)
    return GateFigures(
        min_retention=gate.min_retention,
        retention=mean.retention,
        confidence=gate.confidence,
        passed=verdict == "pass",
        verdict=verdict,
        bars=tuple(bars),
    )


def _bar(
    name: str, least: float, retention: float | None, span: Interval | None, samples: int, confidence: float
) -> BarFigures:
    verdict: Verdict
    needed = None
    if retention is None or span is None:
        verdict = "no interval"
    elif span.low >= least:
        verdict = "pass"
    elif span.high < least:
        verdict = "fail"
    else:
        verdict = "not enough samples"
        edge = span.low if retention > least else span.high
        needed = samples_needed(samples, retention, edge, least, confidence)
    return BarFigures(
        name=name,
        min_retention=least,
        retention=retention,
        interval=span,
        verdict=verdict,
        samples=samples,
        samples_needed=needed,
    )
