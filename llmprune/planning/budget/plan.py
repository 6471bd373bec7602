"""Plan of a recipe with a budget whose shape is not chosen yet: its candidates, and the cost of the search for one.

Everything else in the plan is that of one candidate, which stands for the shape that the search will choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from llmprune.evaluation.bench.speed_prediction import predict, require_telling
from llmprune.evaluation.bench.speed_subject import SpeedSubject
from llmprune.evaluation.bench.speed_table import stored_table
from llmprune.planning.base import Base
from llmprune.planning.budget.candidates import Candidate, Candidates, candidates
from llmprune.planning.budget.cost import SearchCost, search_cost
from llmprune.planning.budget.limits import Limits, SpeedOf, amount, idle_limits
from llmprune.planning.budget.settle import settled
from llmprune.planning.budget.space import SearchSpace, search_space
from llmprune.planning.duration.parts import Part, RunWork
from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.base import Figures
from llmprune.results.sentences.search import describe_amount

_ANY = 0.999  # tolerance of a plan that does not know how many tokens are kept
_UNCOUNTED = (
    "budget: the run counts the tokens of vocabulary first; until then the plan assumes that all are kept, so that its "
    "candidates lose more of their layers and units than those of the run"
)

LAYER_ORDER, SEARCH = "layer order", "search"  # steps


class PlannedShape(Figures):
    """A candidate by name, with its sizes."""

    name: str
    parameters: int
    active_parameters: int
    bytes: int
    kv_bytes_per_token: int | None


class AxisRange(Figures):
    """Smallest and largest value of an axis among the candidates; ``dense``: the dense model's. Of the widest MLP."""

    name: str  # layers, mlp, heads or experts
    least: int
    most: int
    dense: int


class VocabularyPart(Figures):
    """Reduction of an amount that fewer tokens make, and the rest of it, which the shape has to make at least."""

    by_tokens: float
    by_shape: float


class BudgetMember(Figures):
    """One model of the family. ``limits``: in absolute numbers, by name; ``candidates``: shapes that meet them.

    ``vocabulary``: its part in the limits that tokens count in, where its size is known.
    """

    limits: dict[str, float]
    vocabulary: dict[str, VocabularyPart] = Field({})
    candidates: int
    tried: int
    axes: tuple[AxisRange, ...]
    smallest: PlannedShape
    largest: PlannedShape


class BudgetPlan(Figures):
    """Candidates for each model of the family, the largest first. ``nominal``: the shape that the plan's sizes are of.

    ``exact``: False where layers differ in size, so that the sizes depend on which are removed.
    """

    members: tuple[BudgetMember, ...]
    nominal: str
    exact: bool
    search: SearchCost


@dataclass(frozen=True)
class OpenBudget:
    """The planned budget of a recipe. ``recipe``: settled to the nominal shape; ``notes``: on its limits."""

    plan: BudgetPlan
    recipe: Recipe
    notes: tuple[str, ...]


def plan_budget(recipe: Recipe, base: Base, *, speed: SpeedOf | None = None, tokens: int | None = None) -> OpenBudget:
    """Plan the budget of a recipe. Raises RecipeError for a budget that this model cannot meet.

    ``speed``: predicts a shape's speed from a table that was measured before; None without one. ``tokens``: that the
    vocabulary keeps; None where all are, and until they are counted.
    """
    space = search_space(recipe, base, tokens=tokens)
    limits = [planned_limits(space, member, has_table=speed is not None) for member in space.members]
    is_counted = recipe.vocabulary is None or space.tokens is not None
    if not is_counted:
        space = replace(space, budget=space.budget.model_copy(update={"tolerance": _ANY}))
        limits = [_reachable(space, one, speed=speed) for one in limits]
    found = [candidates(space, one, speed=speed) for one in limits]
    nominal = found[0].nominal
    plan = BudgetPlan(
        members=tuple(_member(space, one, asked=asked) for one, asked in zip(found, space.members, strict=True)),
        nominal=nominal.shape.name,
        exact=space.counter.is_exact,
        search=search_cost(space, [one.tried for one in found], recipe=recipe),
    )
    own = settled(recipe, nominal.shape, anatomy=base.anatomy, removed=None)
    notes = _notes(space, found, has_table=speed is not None)
    return OpenBudget(plan, own, tuple(notes if is_counted else [*notes, _UNCOUNTED]))


def stored_speed(recipe: Recipe, base: Base, *, elsewhere: bool) -> SpeedOf | None:
    """Return the prediction of speeds from a table that is there already; None where the run will measure one.

    ``elsewhere``: the run will have another device than this process. Raises RecipeError for a wrong file,
    EvaluationError for one whose measurements spread too much; a run measures a kept table like that again.
    """
    budget = recipe.budget
    if budget is None or budget.speed is None or (elsewhere and budget.speed_table is None):
        return None
    subject = SpeedSubject.of(recipe.model, config=base.config, anatomy=base.anatomy)
    table = stored_table(subject, settings=budget.speed_settings, file=budget.speed_table)
    if table is None:
        return None
    if budget.speed_table is not None:
        require_telling(table, min(budget.limits["speed"]))
    return lambda shape: predict(table, shape).ratio


def planned_limits(space: SearchSpace, limits: Limits, *, has_table: bool) -> Limits:
    """Return the limits that a plan applies.

    Without a table of times a limit of the speed is left out. Where it is the only one, the speed is assumed to grow as
    the parameters that a token uses shrink.
    """
    if has_table or "speed" not in limits:
        return limits
    rest = {name: value for name, value in limits.items() if name != "speed"}
    if rest:
        return rest
    least, most = (space.counter.sizes(one).active_parameters for one in (space.smallest, space.largest))
    wanted = min(space.dense_sizes.active_parameters / limits["speed"], most - 1)  # the shape has to lose something
    return {"active_parameters": max(wanted, least)}


def _reachable(space: SearchSpace, limits: Limits, *, speed: SpeedOf | None) -> Limits:
    """Return limits that a shape with all tokens can meet, where fewer tokens will do a part that is not known yet."""
    smallest, budget = space.smallest, space.budget
    sizes = space.counter.sizes(smallest)
    return {
        name: (min(value, speed(smallest)) if speed else value)
        if name == "speed"
        else max(value, amount(name, sizes, budget=budget) if name != "kv_cache" else 0)
        for name, value in limits.items()
    }


def with_search(work: RunWork, cost: SearchCost) -> RunWork:
    """Return the work of a run with that of its search, which comes before pass 2."""
    passes = {LAYER_ORDER: cost.order_passes, SEARCH: cost.forward_passes}
    parts = [
        Part(step=step, name=step, work=work.forward * times, shared=True) for step, times in passes.items() if times
    ]
    index = next(index for index, one in enumerate(work.parts) if one.step == "pass 2")
    return work.model_copy(update={"parts": (*work.parts[:index], *parts, *work.parts[index:])})


def _member(space: SearchSpace, found: Candidates, *, asked: Limits) -> BudgetMember:
    by_size = sorted(found.found, key=lambda one: one.sizes.parameters)
    return BudgetMember(
        limits=dict(asked),
        vocabulary={} if space.tokens is None else _vocabulary_parts(space, asked),
        candidates=len(found.found),
        tried=len(found.tried),
        axes=_ranges(space, found.found),
        smallest=_planned(by_size[0]),
        largest=_planned(by_size[-1]),
    )


def _vocabulary_parts(space: SearchSpace, limits: Limits) -> dict[str, VocabularyPart]:
    """Return the part of the vocabulary in each limit that tokens count in; predictions of speed do not add up."""
    parts = {}
    for name, value in limits.items():
        if name != "speed":
            sizes = space.dense_sizes, space.counter.sizes(space.largest)
            dense, fewer = (amount(name, one, budget=space.budget) for one in sizes)
            if fewer < dense:
                parts[name] = VocabularyPart(by_tokens=dense - fewer, by_shape=max(fewer - value, 0.0))
    return parts


def _planned(one: Candidate) -> PlannedShape:
    sizes = one.sizes
    return PlannedShape(
        name=one.shape.name,
        parameters=sizes.parameters,
        active_parameters=sizes.active_parameters,
        bytes=sizes.bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
    )


def _ranges(space: SearchSpace, found: Sequence[Candidate]) -> tuple[AxisRange, ...]:
    """Return the range of each axis that can give."""
    dense = space.dense
    values: dict[str, tuple[int | None, list[int | None]]] = {
        "layers": (dense.layers, [one.shape.layers for one in found]),
        "heads": (dense.kv_groups, [one.shape.kv_groups for one in found]),
        "experts": (dense.experts, [one.shape.experts for one in found]),
    }
    if dense.widths:
        widest = max(dense.neurons, key=dense.neurons.__getitem__)
        values["mlp"] = dense.neurons[widest], [one.shape.neurons[widest] for one in found]
    ranges = []
    for name in space.axes:
        whole, numbers = values[name]
        counted = [number for number in numbers if number is not None]
        assert whole is not None, "an axis that can give has a number"
        ranges.append(AxisRange(name=name, least=min(counted), most=max(counted), dense=whole))
    return tuple(ranges)


def _notes(space: SearchSpace, found: Sequence[Candidates], *, has_table: bool) -> list[str]:
    """Return notes on limits that decide nothing, and on the speed."""
    notes: list[str] = []
    dense, budget = space.dense_sizes, space.budget
    idle = {name for member in space.members for name in idle_limits(member, dense, budget=budget)}
    notes += [f"budget.{name}: the dense model meets it already; it decides nothing" for name in sorted(idle)]
    fewer = space.counter.sizes(space.largest)
    by_tokens = {name for member in space.members for name in idle_limits(member, fewer, budget=budget)} - idle
    notes += [f"budget.{name}: fewer tokens alone meet it; it decides nothing more" for name in sorted(by_tokens)]
    idle |= by_tokens
    for one in found:
        for name in one.limits.keys() - idle - {"speed"}:
            most = max(amount(name, each.sizes, budget=budget) for each in one.found)
            if len(one.limits) > 1 and most < one.limits[name] * (1 - budget.tolerance):
                notes.append(
                    f"budget.{name}: decides nothing beside the other limits: the candidates have at most "
                    f"{describe_amount(name, most)}, and {describe_amount(name, one.limits[name])} are allowed"
                )
    if budget.speed is not None and not has_table:
        assumed = (
            "the plan assumes that it grows as the parameters that a token uses shrink"
            if len(budget.limits) == 1
            else "the plan's candidates are not limited by it"
        )
        notes.append(f"budget.speed: the times of the model's parts are measured in the run, and until then {assumed}")
    return notes
