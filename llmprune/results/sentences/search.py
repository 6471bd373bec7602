"""Sentences about the search for a shape: the budget, the choice, what was rejected, and the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.formatting import byte_size, change, count, duration, fixed, percent, plural, share, times

AXES = {"layers": "layers", "mlp": "MLP neurons", "heads": "KV groups", "experts": "experts"}  # for people
_SINGLE = {
    "layers": "only removes layers",
    "mlp": "only narrows the MLPs",
    "heads": "only removes key-value groups",
    "experts": "only removes experts",
}
_LIMITS = {
    "parameters": lambda value: f"{count(value)} parameters",
    "active_parameters": lambda value: f"{count(value)} active parameters",
    "weights": lambda value: f"weights of {byte_size(value)}",
    "kv_cache": lambda value: f"a key-value cache of {byte_size(value)} per token",
    "speed": lambda value: f"{times(value)} the dense model's speed",
}


@dataclass(frozen=True)
class BudgetSentences:
    """Sentences about the shape chosen for one budget. ``further``: what one step further in each axis costs."""

    limits: str
    choice: str
    margin: list[str]
    further: list[str]


def describe_budgets(found: SearchFigures) -> list[BudgetSentences]:
    """Return the sentences about each reported budget."""
    return [
        BudgetSentences(
            describe_limits(found.chosen[size].limits),
            _describe_choice(found, size),
            _describe_margin(found, size),
            _describe_further(found, size),
        )
        for size in found.sizes
    ]


def describe_limits(limits: dict[str, float]) -> str:
    """Return ``at most 100.9 M parameters, at least 1.50× the dense model's speed``."""
    return ", ".join(
        f"at {'least' if name == 'speed' else 'most'} {describe_amount(name, value)}" for name, value in limits.items()
    )


def describe_amount(name: str, value: float) -> str:
    """Return the amount that a limit is about: ``100.9 M parameters``, ``weights of 12 GB``."""
    return _LIMITS[name](value)


def describe_search(found: SearchFigures) -> str:
    """Return how many shapes were tried, what they were judged on, and what that cost."""
    candidates = sum(found.chosen[size].candidates for size in found.sizes)
    shapes = sum(found.chosen[size].tried for size in found.sizes)
    of = f" of {plural(candidates, 'shape')} that meet{'s' * (candidates == 1)} the budget" if candidates else " shapes"
    kept = "" if found.vocabulary is None else f"; each keeps {found.vocabulary:,} tokens, and was judged with all"
    return (
        f"{shapes}{of} were tried, judged by KL divergence from the dense model on {plural(found.windows, 'window')} "
        f"({plural(found.tokens, 'token')}) of {plural(len(found.sources), 'source')}; cost: {_passes(found)}, "
        f"{duration(found.seconds)}{kept}"
    )


def _describe_choice(found: SearchFigures, size: int) -> str:
    """Return the shape chosen for a budget, with its size and divergence, and its speed where that was asked for."""
    chosen, shape = found.chosen[size], found.chosen_shape(size)
    kept = percent(share(found.dense_parameters, shape.parameters))
    text = (
        f"{shape.name}: {count(shape.parameters)} parameters ({kept} of the dense model), score "
        f"{fixed(shape.score)}{' after the repair' if shape.repaired else ''}{_span(shape)}"
    )
    if shape.speed is None:
        return text
    measured = "" if chosen.measured_speed is None else f", measured {times(chosen.measured_speed)}"
    off = "" if chosen.measured_speed is None else f" (prediction off by {_off(shape.speed, chosen.measured_speed)})"
    return f"{text}; speed: predicted {times(shape.speed)} the dense model's{measured}{off}"


def _describe_margin(found: SearchFigures, size: int) -> list[str]:
    """Return how much worse the best shape of each single axis is than the chosen one."""
    chosen = found.chosen_shape(size)
    sentences = []
    for axis, words in _SINGLE.items():
        alone = [one for one in _rivals(found, size) if found.axes(one) == (axis,) and one.name != chosen.name]
        if alone:
            sentences.append(f"the best shape that {words} ({_best(alone).name}) {_against(_best(alone), chosen)}")
    return sentences


def _describe_further(found: SearchFigures, size: int) -> list[str]:
    """Return what one step further in each axis would save and cost."""
    chosen = found.chosen_shape(size)
    sentences = []
    for one in found.tried:
        if one.size == size and one.further is not None:
            its, best = one.compared(chosen)
            cost = f"score {its - best:+.3f}".replace("-", "−")
            saved = change(chosen.parameters, one.parameters)
            sentences.append(f"{AXES[one.further]}: {one.name}, {saved} parameters, {cost}")
    return sentences


def describe_broken(found: SearchFigures) -> list[str]:
    """Return a sentence for each shape that a source finds broken."""
    return [
        f"{one.name} is broken on {one.broken}: KL divergence {fixed(one.divergence[one.broken])} there, "
        f"score {fixed(one.score)}"
        for one in found.tried
        if one.broken is not None and one.size in found.sizes
    ]


def _rivals(found: SearchFigures, size: int) -> list[TriedShape]:
    return [one for one in found.tried if one.size == size and one.further is None and one.broken is None]


def _best(shapes: Sequence[TriedShape]) -> TriedShape:
    """Return the shape with the lowest score, a repaired one before those that dropped out earlier."""
    return min(shapes, key=lambda one: (not one.repaired, one.score))


def _against(one: TriedShape, chosen: TriedShape) -> str:
    its, best = one.compared(chosen)
    state = " before the repair" if chosen.repaired and not one.repaired else ""
    return f"has {fixed(its)} against {fixed(best)}{state} ({change(best, its)})"


def _span(shape: TriedShape) -> str:
    """Return the range of the divergence over the sources."""
    least, most = min(shape.divergence.values()), max(shape.divergence.values())
    return f" (KL divergence {fixed(least)} to {fixed(most)} nats per token by source)"


def _off(predicted: float, measured: float) -> str:
    return percent(abs(predicted / measured - 1)) if measured else "–"


def _passes(found: SearchFigures) -> str:
    return f"{found.forward_passes:.1f} forward passes over the calibration text"
