"""Sentences about results: verdicts, sparsity, stability of the choice, copied files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from llmprune.common.schema import format_size
from llmprune.results.figures.evaluation import AgreementFigures, BarFigures, GateFigures, SpeedFigures, Verdict
from llmprune.results.figures.layers import BlockFigures, SparsityFigures
from llmprune.results.figures.result_files import BaseFiles, RequantizedFigures
from llmprune.results.figures.stability import SourceFigures, StabilityFigures
from llmprune.results.formatting import NOTHING, fixed, number, percent, plural, ranges, span, times

UNMEASURED = (
    "Nothing was evaluated, so the loss of quality is unknown. "
    "Add evaluation.perplexity, evaluation.tasks or evaluation.generation to the recipe to measure it."
)
_MOST_FILES = 30  # listed in one sentence


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


def describe_sparsity(found: SparsityFigures) -> str:
    """Return a sentence with the zeros and groups counted in the saved file."""
    text = (
        f"{found.pattern} by {found.method}: {found.zeros:,} of the {found.weights:,} weights in "
        f"{plural(found.matrices, 'matrix', many='matrices')} are zero"
    )
    if found.permuted:
        text += f"; MLP neurons and value channels were ordered for the pattern in {found.permuted:,} of them"
    if found.groups:
        text += f"; all {found.groups:,} groups were counted in the saved file, {found.violations:,} break the pattern"
    return f"{text}. Zeros are stored: the file is not smaller, and only kernels for the pattern run it faster."


def describe_requantized(found: RequantizedFigures) -> str:
    """Return a phrase with format, size and error of the result in its base's quantized format."""
    weights = plural(found.weights, "weight matrix", many="weight matrices")
    return (
        f"{found.format} in {weights}, {format_size(found.bytes)}; KL divergence from the unquantized result "
        f"{number(found.divergence)} nats per token on calibration text"
    )


def describe_greedy_agreement(found: AgreementFigures) -> str:
    """Return how often, and how far, the pruned model follows the dense model's greedy answers."""
    return (
        f"along {plural(found.samples, 'answer')} of the dense model ({plural(found.tokens, 'token')}) the pruned "
        f"model ranks the same token first for {percent(found.share)} ({span(found.interval)}); it first differs after "
        f"{number(found.first_median)} tokens in the median, {number(found.first_mean)} on average; "
        f"{percent(found.whole, 0)} of the answers have no difference"
    )


def describe_agreement(stability: StabilityFigures) -> list[str]:
    """Return a sentence for each kind of pruned part: how far the cuts of both calibration halves overlap."""
    kinds = {
        "layers": stability.layers,
        "neurons": stability.neurons,
        "attention heads": stability.heads,
        "experts": stability.experts,
    }
    return [
        f"of the {kind} that one half of the calibration text removes, the other half removes {percent(overlap.mean)}"
        + (f" (minimum over layers: {percent(overlap.least)})" if overlap.least < overlap.mean else "")
        + f"; expected by chance: {percent(overlap.by_chance)}"
        for kind, overlap in kinds.items()
        if overlap is not None
    ]


def describe_sources(found: SourceFigures) -> list[str]:
    """Return sentences about what each source of the calibration text alone would keep and remove."""
    kinds = {"neurons": found.neurons, "attention heads": found.heads, "experts": found.experts}
    sentences = []
    for kind, shares in kinds.items():
        known = {layer: share for layer, share in enumerate(shares) if share is not None}
        if known:
            least = min(known, key=known.__getitem__)
            mean = sum(known.values()) / len(known)
            sentences.append(
                f"of the {kind} that are kept, {percent(mean)} would be kept by each source of text alone too "
                f"(minimum: {percent(known[least])}, in layer {least})"
            )
    by_choice: dict[tuple[int, ...], list[str]] = {}
    for name, removed in zip(found.names, found.removed_layers, strict=False):
        by_choice.setdefault(removed, []).append(name)
    if len(by_choice) == 1:
        sentences.append(f"each source alone would remove layers {ranges(*by_choice)}")
    elif by_choice:
        parts = [f"layers {ranges(removed)} by {' and '.join(names)}" for removed, names in by_choice.items()]
        sentences.append(f"removed by one source alone: {', '.join(parts)}")
    return sentences


def describe_speedup(speed: SpeedFigures) -> str:
    """Return the range of the speedup: ``1.15–1.27× over 3 pairs of runs``, and whether the pairs alternated."""
    apart = "" if speed.alternating else ", all of one model before the other, because both do not fit in memory"
    return f"{speed.ratio_low:.2f}–{times(speed.ratio_high)} over {plural(speed.repeats, 'pair')} of runs{apart}"


def describe_training(block: BlockFigures | None) -> str:
    """Return the held-out error of a layer before and after its training: ``0.212 → 0.145 (84 steps)``."""
    if block is None:
        return NOTHING
    if not block.steps:
        return "not trained" if block.steps is None else f"{fixed(block.before)}, kept"
    return f"{fixed(block.before)} → {fixed(block.after)} ({plural(block.steps, 'step')})"


def describe_carried(files: BaseFiles) -> str:
    """Return the names of the base model's files that are copied."""
    return _listed(files.carried)


def describe_left(files: BaseFiles) -> str:
    """Return the names of the base model's files that are not copied, each with the reason."""
    return _listed([f"{name} ({reason})" for name, reason in files.left.items()])


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _MOST_FILES
    return ", ".join(texts[:_MOST_FILES]) + (f" and {more:,} more" if more > 0 else "")
