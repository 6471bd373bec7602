"""Rounds of cut and training: the recipe of each round, and the sizes that the plan expects after it.

Each round goes an equal part of the way from the dense sizes to those asked for, and is scored anew (Han et al.,
arXiv 1506.02626). Zeros in N:M patterns come with the last round, for a pattern has no half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.anatomy.types import Anatomy
from llmprune.common.errors import RecipeError
from llmprune.cut.apply import cut_config
from llmprune.cut.layer_choice import possible_counts
from llmprune.planning.base import Base
from llmprune.planning.duration.generating import RECOVERY_GENERATED, SELF_GENERATED
from llmprune.planning.planned_sizes import (
    PlannedCut,
    planned_experts,
    planned_heads,
    planned_layers,
    planned_widths,
)
from llmprune.planning.recovery import RecoveryPlan
from llmprune.planning.recovery_notes import require_a_step
from llmprune.planning.self_generated import window_length
from llmprune.planning.width_rounding import width_step
from llmprune.recipe.depth import Depth
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.experts import Experts
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.recover import Recover
from llmprune.recipe.sparsity import Sparsity
from llmprune.recipe.width import Width
from llmprune.results.figures import Figures
from llmprune.results.report_schema import Size

if TYPE_CHECKING:
    from llmprune.planning.plan import Plan

_WRITTEN_ONCE = (SELF_GENERATED, RECOVERY_GENERATED)  # windows of the dense model, which all rounds share


class PlannedRound(Figures):
    """Size after a round, and the tokens that it trains on; None where the recipe gives hours."""

    size: Size
    tokens: int | None


@dataclass(frozen=True)
class _Sizes:
    """What is cut after some rounds, all together. ``named``: indices of removed layers that the recipe names."""

    removed: int = 0
    named: tuple[int, ...] = ()
    widths: dict[str, int] = field(default_factory=dict)  # neurons kept, by config field
    kv_groups: int | None = None
    experts: int | None = None
    share: float = 0.0  # of the weights that are zero, without a pattern of groups
    groups: bool = False  # True once the pattern of groups is there


def has_rounds(recipe: Recipe) -> bool:
    """Check that a recipe cuts in several rounds."""
    return recipe.recover is not None and recipe.recover.rounds > 1


def round_recipes(recipe: Recipe, anatomy: Anatomy, planned: PlannedCut) -> tuple[Recipe, ...]:
    """Return the recipe of each round, which cuts the result of the round before; all name the recipe's own model.

    ``planned``: what all rounds together keep. Every round but the last measures perplexity alone, for its text must
    not be trained on. Raises RecipeError where a round would cut nothing, or train for less than a step.
    """
    recover = recipe.recover
    assert recover is not None, "without the section there is one round"
    sizes = _sizes(recipe, anatomy, planned)
    cutting = sum(before != after for before, after in pairwise(sizes))
    if cutting < recover.rounds:
        raise RecipeError(_too_many(recover.rounds, cutting))
    _require_steps(recipe, recover)
    return tuple(
        _round(recipe, before, after, number=number) for number, (before, after) in enumerate(pairwise(sizes), start=1)
    )


def with_rounds(
    plan: Plan, recipe: Recipe, *, base: Base, planned: PlannedCut, plan_one: Callable[[Recipe, Base, PlannedCut], Plan]
) -> Plan:
    """Return the plan of a recipe with the work of all its rounds, and the memory of the largest, which is the first.

    ``plan``: that of the whole cut in one round; ``plan_one``: plans one round, of a model without files.
    """
    plans = []
    for one in round_recipes(recipe, base.anatomy, planned):
        kept = planned_cut(one, base.anatomy)
        plans.append(plan_one(one, base, kept))
        base = _base_after(one, base, kept)
    first, work = plans[0], plan.work
    later = [part for each in plans[1:] for part in each.work.parts if part.step not in _WRITTEN_ONCE]
    parts = (*first.work.parts, *later)
    return plan.model_copy(
        update={
            "memory": first.memory,
            "batch_sizes": first.batch_sizes,
            "devices": first.devices,
            "shortage": next((each.shortage for each in plans if each.shortage), None),
            "rounds": tuple(PlannedRound(size=each.pruned, tokens=_trained(each).tokens) for each in plans),
            "recovery": _of_all_rounds(plan, plans),
            "work": work.model_copy(update={"parts": parts}),
        }
    )


def _sizes(recipe: Recipe, anatomy: Anatomy, planned: PlannedCut) -> list[_Sizes]:
    """Return what is cut before the first round, and after each."""
    assert recipe.recover is not None
    rounds, order = recipe.recover.rounds, _order_of_named(recipe)
    found = [_dense_sizes(recipe, anatomy)]
    goal = anatomy.num_layers - len(planned.layers)
    for number in range(1, rounds + 1):
        part, before = number / rounds, found[-1]
        removed = _between(anatomy.num_layers, anatomy.num_layers - goal, part, _possible_layers(recipe, anatomy))
        count = max(anatomy.num_layers - removed, before.removed)
        found.append(
            _Sizes(
                removed=count,
                named=tuple(sorted(order[:count])),
                widths={
                    name: _width(anatomy.widths[name], kept, part, before=before.widths.get(name))
                    for name, kept in planned.widths.kept.items()
                },
                kv_groups=_kv_groups(anatomy, planned.heads.kv_groups, part),
                experts=_experts(anatomy, planned.experts, part),
                share=_share(recipe.sparsity, part),
                groups=_has_groups(recipe.sparsity) and number == rounds,
            )
        )
    return found


def _dense_sizes(recipe: Recipe, anatomy: Anatomy) -> _Sizes:
    """Return the sizes that nothing is cut from."""
    widths = planned_widths(recipe.width, anatomy).kept
    return _Sizes(
        widths={name: anatomy.widths[name] for name in widths},
        kv_groups=anatomy.heads.count if anatomy.heads else None,
        experts=anatomy.experts.count if anatomy.experts else None,
    )


def _order_of_named(recipe: Recipe) -> list[int]:
    """Return the layers that the recipe names, in the order of their removal, so that each round takes from all."""
    depth, recover = recipe.depth, recipe.recover
    if depth is None or depth.layers is None or recover is None:
        return []
    if depth.keep_pattern:
        raise RecipeError(
            "recover.rounds: depth.layers with depth.keep_pattern names layers that only together preserve the "
            "pattern; give depth.remove and let the scores choose, or one round"
        )
    named = sorted(depth.layers)
    return [index for first in range(recover.rounds) for index in named[first :: recover.rounds]]


def _possible_layers(recipe: Recipe, anatomy: Anatomy) -> Sequence[int]:
    kept_pattern = recipe.depth is not None and recipe.depth.keep_pattern
    return possible_counts(anatomy) if kept_pattern else range(1, anatomy.num_layers + 1)


def _between(dense: int, goal: int, part: float, possible: Sequence[int]) -> int:
    """Return the possible number nearest to ``part`` of the way from ``dense`` to ``goal``, which are possible."""
    wanted = dense + (goal - dense) * part
    return min((one for one in possible if goal <= one <= dense), key=lambda one: (abs(one - wanted), one))


def _width(dense: int, goal: int, part: float, *, before: int | None) -> int:
    """Return a width from which ``goal`` is still a multiple of ``width_step``."""
    step, before = width_step(dense), dense if before is None else before
    fitting = [width for width in range(goal, before + 1, step) if width_step(width) == step]
    return min({*fitting, goal, before}, key=lambda width: (abs(width - dense - (goal - dense) * part), width))


def _kv_groups(anatomy: Anatomy, goal: int | None, part: float) -> int | None:
    if anatomy.heads is None or goal is None:
        return goal
    return _between(anatomy.heads.count, goal, part, (*anatomy.heads.possible, anatomy.heads.count))


def _experts(anatomy: Anatomy, goal: int | None, part: float) -> int | None:
    if anatomy.experts is None or goal is None:
        return goal
    return _between(anatomy.experts.count, goal, part, range(goal, anatomy.experts.count + 1))


def _has_groups(sparsity: Sparsity | None) -> bool:
    return sparsity is not None and sparsity.parsed.of is not None


def _share(sparsity: Sparsity | None, part: float) -> float:
    return 0.0 if sparsity is None or _has_groups(sparsity) else sparsity.parsed.share * part


def _too_many(rounds: int, cutting: int) -> str:
    if not cutting:
        return (
            "recover.rounds: nothing is cut, so that there is nothing to divide into rounds; name what to remove in "
            "depth, width, experts or sparsity, or remove the key"
        )
    return (
        f"recover.rounds: {rounds} rounds, of which only {cutting} would remove anything, because sizes are rounded; "
        f"set recover.rounds to {cutting}, or remove more"
    )


def _require_steps(recipe: Recipe, recover: Recover) -> None:
    """Raise RecipeError where the tokens of one round are fewer than those of one optimiser step."""
    try:
        require_a_step(recover.of_round, length=window_length(recipe))
    except RecipeError as error:
        raise RecipeError([f"{one} (of each of the {recover.rounds} rounds)" for one in error.problems]) from None


def _round(recipe: Recipe, before: _Sizes, after: _Sizes, *, number: int) -> Recipe:
    """Return the recipe that cuts a model of the sizes ``before`` to those ``after``."""
    recover = recipe.recover
    assert recover is not None
    own = recover.of_round
    if number > 1:
        source = {"against": recipe.reference.id, "against_revision": recipe.reference.revision}
        own = own.model_copy(update=source)
    update = {
        "depth": _depth(recipe.depth, before, after),
        "width": _narrowed(recipe.width, before, after),
        "experts": _fewer_experts(recipe.experts, before, after),
        "sparsity": _sparser(recipe.sparsity, before, after),
        "recover": own,
    }
    if number < recover.rounds:
        update |= {"evaluation": Evaluation(generation=None, perplexity=recipe.evaluation.perplexity), "hub": None}
    return recipe.derived(update)


def _depth(depth: Depth | None, before: _Sizes, after: _Sizes) -> Depth | None:
    number = after.removed - before.removed
    if depth is None or not number:
        return None
    if depth.layers is None:
        return depth.model_copy(update={"remove": number, "keep": None})
    new = [index for index in after.named if index not in before.named]
    return depth.model_copy(
        update={"layers": tuple(index - sum(gone < index for gone in before.named) for index in new)}
    )


def _narrowed(width: Width | None, before: _Sizes, after: _Sizes) -> Width | None:
    if width is None:
        return None
    neurons = {name: kept for name, kept in after.widths.items() if kept < before.widths[name]} or None
    heads = after.kv_groups if after.kv_groups != before.kv_groups else None
    if neurons is None and heads is None:
        return None
    return width.model_copy(update={"mlp": None, "neurons": neurons, "heads": heads})


def _fewer_experts(experts: Experts | None, before: _Sizes, after: _Sizes) -> Experts | None:
    if experts is None or after.experts == before.experts:
        return None
    return experts.model_copy(update={"remove": None, "keep": after.experts})


def _sparser(sparsity: Sparsity | None, before: _Sizes, after: _Sizes) -> Sparsity | None:
    if sparsity is None or (before.share, before.groups) == (after.share, after.groups):
        return None
    return sparsity if after.groups else sparsity.model_copy(update={"pattern": after.share})


def planned_cut(recipe: Recipe, anatomy: Anatomy) -> PlannedCut:
    """Return the layers and units that a recipe keeps. Raises RecipeError for what the model does not allow."""
    return PlannedCut(
        planned_layers(recipe.depth, anatomy),
        planned_widths(recipe.width, anatomy),
        planned_experts(recipe.experts, anatomy),
        planned_heads(recipe.width, anatomy),
    )


def _base_after(recipe: Recipe, base: Base, planned: PlannedCut) -> Base:
    """Return the model after a round, which has no files yet."""
    trust, widths = recipe.model.trust_remote_code, planned.widths.kept
    config = cut_config(
        base.config,
        base.anatomy,
        layers=planned.layers,
        widths=widths,
        num_experts=planned.experts,
        kv_groups=planned.heads.kv_groups,
    )
    model = build_meta_model(config, base.dense.dtype, trust_remote_code=trust)
    return Base(config, None, model, discover(config, trust), has_files=False)


def _trained(plan: Plan) -> RecoveryPlan:
    assert plan.recovery is not None, "every round trains"
    return plan.recovery


def _of_all_rounds(whole: Plan, plans: Sequence[Plan]) -> RecoveryPlan:
    """Return the plan of all trainings together: the tokens of all, the memory of the largest.

    The disk holds the predictions for every round, and the checkpoint of the round before.
    """
    found = [_trained(plan) for plan in plans]
    first = found[0]
    steps, tokens = (
        None if None in counts else sum(count or 0 for count in counts)
        for counts in ([one.steps for one in found], [one.tokens for one in found])
    )
    predictions = sum((one.tokens or 0) * one.bytes_of_token for one in found[1:])
    update = {"memory": first.memory, "trained": first.trained, "windows_of_step": first.windows_of_step}
    update |= {"steps": steps, "tokens": tokens, "disk": first.disk + predictions + plans[0].disk}
    return _trained(whole).model_copy(update=update)
