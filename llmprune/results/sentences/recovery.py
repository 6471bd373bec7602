"""Sentences about the training after the cut."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.results.figures.recovery import MeanScore, RecoveryFigures, RecoveryScores
from llmprune.results.figures.rounds import RoundFigures
from llmprune.results.formatting import count, duration, energy, fixed, percent, plural, span

_METHODS = {"full": "All weights", "lora": "Low-rank adapters (LoRA, merged into the weights)"}
_LOSSES = {"distillation": "the dense model's predictions", "language_model": "the text alone"}


def describe_recovery(found: RecoveryFigures) -> str:
    """Return what was trained, on how much, for how long, and with which energy."""
    used = "" if found.kilowatt_hours is None else f", about {energy(found.kilowatt_hours)}"
    return (
        f"{_METHODS.get(found.method, found.method)} trained on {_LOSSES.get(found.loss, found.loss)}: "
        f"{count(found.tokens)} tokens in {plural(found.steps, 'step')} of {count(found.batch_tokens)}, learning rate "
        f"up to {found.learning_rate:.3g}, {duration(found.seconds)}{used}"
    )


def describe_divergence(found: RecoveryFigures) -> str:
    """Return the mean held-out divergence before and after, and which weights were saved."""
    if found.best_step == 0:
        return (
            "no step came closer to the dense model on the held-out windows, so the weights from before the training "
            "were kept"
        )
    before, after = found.before.mean_divergence, found.saved.mean_divergence
    over = f", mean of {len(found.saved.divergence)} sources" if len(found.saved.divergence) > 1 else ""
    saved = "the last" if found.best_step == found.steps else "the best"
    return (
        f"held-out KL divergence {fixed(before)} → {fixed(after)} nats per token{over}; saved: the weights of step "
        f"{found.best_step:,}, {saved}"
    )


def describe_recovery_problems(found: RecoveryFigures) -> list[str]:
    """Return a sentence for sources that got worse, for setbacks, and for each note of the training."""
    before, after = found.before.divergence, found.saved.divergence
    sentences = []
    if found.worse:
        each = ", ".join(f"{name} ({fixed(before[name])} → {fixed(after[name])})" for name in found.worse)
        sentences.append(f"further from the dense model than before the training: {each}")
    if found.setbacks:
        times = "once" if found.setbacks == 1 else f"{found.setbacks} times, each time"
        sentences.append(
            f"the training diverged and returned to its last good weights {times} with half the learning rate"
        )
    return [*sentences, *found.notes]


def describe_rounds(rounds: Sequence[RoundFigures]) -> str:
    """Return in how many rounds the model was cut and trained, on how much, and for how long."""
    tokens, seconds = sum(one.tokens for one in rounds), sum(one.seconds for one in rounds)
    return (
        f"cut and trained in {plural(len(rounds), 'round')}, on {count(tokens)} tokens in all, {duration(seconds)}; "
        f"the figures of the recovery are those of round {len(rounds)}"
    )


def describe_gain(found: RecoveryScores) -> str | None:
    """Return the mean retention before the training, and the mean gain by it. None without a mean."""
    before, gain = found.retention_before, found.gain
    if before is None or gain is None:
        return None
    return f"mean retention before the training {_mean(before)}; mean of the scores after / before {_mean(gain)}"


def _mean(found: MeanScore) -> str:
    return f"{percent(found.ratio)} ({span(found.interval)})"
