"""Sentences about the evaluation: the gate's verdict and bars, greedy agreement, speedup."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llmprune.results.figures.evaluation import AgreementFigures, BarFigures, GateFigures, SpeedFigures, Verdict
from llmprune.results.formatting import number, percent, plural, span, times

UNMEASURED = (
    "Nothing was evaluated, so the loss of quality is unknown. "
    "Add evaluation.perplexity, evaluation.tasks or evaluation.generation to the recipe to measure it."
)


class VerdictHeading(NamedTuple):
    """State and heading of a gate's verdict."""

    state: Literal["passed", "failed", "undecided"]
    heading: str


VERDICT_HEADINGS: dict[Verdict, VerdictHeading] = {
    "pass": VerdictHeading("passed", "Gate passed"),
    "fail": VerdictHeading("failed", "Gate not passed"),
    "not enough samples": VerdictHeading("undecided", "Gate undecided"),
    "no interval": VerdictHeading("undecided", "Gate undecided"),
}
_REMEDIES: dict[Verdict, str] = {
    "fail": "prune less, or calibrate with more text",
    "not enough samples": "evaluate more samples (raise evaluation.limit; for a finished run: llmprune reevaluate), "
    "name more tasks, or lower the bar",
    "no interval": "use a metric that is a mean over samples, the same for all tasks of a group "
    "(evaluation.metrics), or tasks with a dense score above zero, or remove the bar",
    "pass": "",
}
_FEW_ANSWERS = ("not enough samples", {"greedy agreement"})  # the only undecided bar
_MORE_ANSWERS = (
    "compare more answers (raise evaluation.generation.samples and run the recipe again, which only evaluates), or "
    "lower the bar"
)


def describe_bar(bar: BarFigures, digits: int = 1) -> str:
    """Return ``mean retention 93.1% (90.2–95.9%), required: at least 95.0%``, and why it is undecided if it is."""
    name = bar.name if bar.kind == "greedy agreement" else f"{bar.name} retention"
    interval = f" ({span(bar.interval, digits)})" if bar.interval else ""
    measured = "unknown" if bar.measured is None else percent(bar.measured, digits)
    text = f"{name} {measured}{interval}, required: at least {percent(bar.minimum, digits)}"
    if bar.verdict == "not enough samples":
        kind = "answer" if bar.kind == "greedy agreement" else "sample"
        needed = f"about {bar.samples_needed:,} are needed" if bar.samples_needed else "no feasible number suffices"
        return f"{text}: {plural(bar.samples, kind)} cannot decide, {needed}"
    if bar.verdict == "no interval":
        return f"{text}: {bar.reason or 'it has no interval'}"
    return text


def describe_missed_bars(gate: GateFigures) -> str:
    """Return the bars that were not passed, separated by semicolons."""
    return "; ".join(describe_bar(bar, 2) for bar in gate.bars if bar.verdict != "pass")


def describe_verdict(gate: GateFigures) -> str:
    """Return the bars that were not passed, and the remedy."""
    head = "the gate is not met" if gate.verdict == "fail" else "the gate is undecided"
    kinds = {bar.kind for bar in gate.bars if bar.verdict == gate.verdict}
    remedy = _MORE_ANSWERS if (gate.verdict, kinds) == _FEW_ANSWERS else _REMEDIES[gate.verdict]
    return f"{head}: {describe_missed_bars(gate)}; {remedy}"


def describe_greedy_agreement(found: AgreementFigures) -> str:
    """Return how often, and how far, the pruned model follows the dense model's greedy answers."""
    return (
        f"along {plural(found.samples, 'answer')} of the dense model ({plural(found.tokens, 'token')}) the pruned "
        f"model ranks the same token first for {percent(found.share)} ({span(found.interval)}); it first differs after "
        f"{number(found.first_median)} tokens in the median, {number(found.first_mean)} on average; "
        f"{percent(found.whole, 0)} of the answers have no difference"
    )


def describe_speedup(speed: SpeedFigures) -> str:
    """Return the range of the speedup: ``1.15–1.27× over 3 pairs of runs``, and whether the pairs alternated."""
    apart = "" if speed.alternating else ", all of one model before the other, because both do not fit in memory"
    return f"{speed.ratio_low:.2f}–{times(speed.ratio_high)} over {plural(speed.repeats, 'pair')} of runs{apart}"
