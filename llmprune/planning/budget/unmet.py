"""Sentences on budgets that no shape meets: what can be had, and what stops the rest."""

from __future__ import annotations

from collections.abc import Collection

from llmprune.cut.shape import Shape
from llmprune.planning.budget.limits import Limits, SpeedOf, amount, of_dense
from llmprune.planning.budget.space import AXES, SearchSpace, moved
from llmprune.results.sentences.search import AXES as NAMES
from llmprune.results.sentences.search import describe_amount


def unreachable(space: SearchSpace, limits: Limits, *, speed: SpeedOf | None) -> list[str]:
    """Return a sentence for each limit that even the smallest shape breaks."""
    smallest, budget = space.smallest, space.budget
    sizes, dense = space.counter.sizes(smallest), space.dense_sizes
    problems = []
    for name, value in limits.items():
        if name == "speed":
            assert speed is not None, "a limit of the speed is applied with a prediction"
            nearest = speed(smallest)
            is_met = nearest >= value
        else:
            nearest = amount(name, sizes, budget=budget)
            is_met = nearest <= value
        if not is_met:
            asked, had = (of_dense(name, one, dense=dense, budget=budget) for one in (value, nearest))
            problems.append(
                f"budget.{name}: {asked} cannot be reached; the nearest is {had}, with {smallest.name}: "
                f"{_stops(space, name)}; lower at_least of an axis, name more axes, {_fewer_tokens(space, name)}"
                "or ask for less reduction"
            )
    return problems


def met_by_vocabulary(space: SearchSpace, limits: Limits, *, speed: SpeedOf | None) -> list[str]:
    """Return a sentence for each limit: fewer tokens alone meet all of them, so that no shape is to be searched."""
    assert space.tokens is not None, "the dense model meets no limits that a search is for"
    budget, sizes = space.budget, space.counter.sizes(space.largest)
    problems = []
    for name, value in limits.items():
        had = speed(space.largest) if name == "speed" and speed else amount(name, sizes, budget=budget)
        asked, reached = (of_dense(name, one, dense=space.dense_sizes, budget=budget) for one in (value, had))
        remedy = f"leave it out of the list of budget.{name}" if budget.family == name else "remove budget"
        problems.append(
            f"budget.{name}: {asked} needs no search: with {space.tokens:,} tokens kept, vocabulary alone reaches "
            f"{reached}; {remedy} to cut the vocabulary alone, ask for less, or keep more tokens"
        )
    return problems


def beyond_tolerance(space: SearchSpace, limits: Limits, *, shape: Shape, used: float, alone: Collection[str]) -> str:
    """Return a sentence where shapes meet all limits, and every one lies farther below them than the tolerance.

    ``shape``: the nearest one; ``used``: the largest part of a limit that it uses up; ``alone``: limits that a shape
    is near without the others.
    """
    budget, sizes = space.budget, space.counter.sizes(shape)
    asked = " and ".join(describe_amount(name, value) for name, value in limits.items())
    had = " and ".join(
        of_dense(name, amount(name, sizes, budget=budget), dense=space.dense_sizes, budget=budget)
        for name in limits
        if name != "speed"
    )
    contradiction = len(limits) > 1 and len(alone) == len(limits)
    why = "they can each be met alone, not together" if contradiction else "the steps of the axes are coarse"
    return (
        f"budget: no shape is within {budget.tolerance:.3g} of {asked}: {why}; the nearest that can be had is "
        f"{shape.name}{had and ', with ' + had}; raise tolerance to {_rounded_up(1 - used):g}, ask for another size, "
        "or name more axes"
    )


def _stops(space: SearchSpace, name: str) -> str:
    """Return the axes that stop a limit at the smallest shape, and those that are not used."""
    last = space.place(space.smallest)
    lengths = zip(AXES, space.lengths, strict=True)
    used = {axis: index for index, (axis, length) in enumerate(lengths) if length > 1}
    stops = []
    for axis, index in used.items():
        if name == "speed" or _changes(space, name, axis=index):
            shape = space.shape(last)
            kept = {
                "layers": shape.layers,
                "mlp": "/".join(str(width) for _, width in shape.widths),
                "heads": shape.kv_groups,
                "experts": shape.experts,
            }[axis]
            noun = NAMES[axis].removesuffix("s") if kept == 1 else NAMES[axis]
            stops.append(f"axes.{axis} keeps at least {kept} {noun}")
    unused = [axis for axis in AXES if axis not in used]
    if _counts_tokens(space, name):
        stops.append(f"vocabulary keeps {space.tokens:,} tokens")
    text = ", ".join(stops) or f"none of the axes {', '.join(used)} makes it smaller"
    return text + (f" (not used: {', '.join(unused)})" if unused else "")


def _fewer_tokens(space: SearchSpace, name: str) -> str:
    return "keep fewer tokens, " if _counts_tokens(space, name) else ""


def _counts_tokens(space: SearchSpace, name: str) -> bool:
    """Check that the tokens kept are in the amount that a limit is about."""
    return space.tokens is not None and name != "kv_cache"


def _changes(space: SearchSpace, name: str, *, axis: int) -> bool:
    """Check that the last step of an axis makes the amount smaller that a limit is about."""
    last = space.place(space.smallest)
    before = space.counter.sizes(space.shape(moved(last, axis, steps=-1)))
    after = space.counter.sizes(space.shape(last))
    return amount(name, after, budget=space.budget) < amount(name, before, budget=space.budget)


def _rounded_up(fraction: float) -> float:
    """Return a fraction in hundredths, rounded up, and below 1."""
    return min(int(fraction * 100 + 1) / 100, 0.99)
