"""Plan of a recipe that cuts and trains in several rounds: the work of all, the memory of the largest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.cut.apply import cut_config
from llmprune.planning.base import Base
from llmprune.planning.duration.generating import RECOVERY_GENERATED, SELF_GENERATED
from llmprune.planning.plan_schema import Plan, PlannedRound
from llmprune.planning.recovery.plan import RecoveryPlan
from llmprune.planning.rounds.recipes import round_recipes
from llmprune.planning.sizes.planned_cut import planned_cut
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.recipe.recipe import Recipe

_WRITTEN_ONCE = (SELF_GENERATED, RECOVERY_GENERATED)  # windows of the dense model, which all rounds share


@dataclass(frozen=True)
class RoundToPlan:
    """Recipe of a round, the model that it cuts, and what it keeps."""

    recipe: Recipe
    base: Base
    planned: PlannedCut


def with_rounds(plan: Plan, recipe: Recipe, *, base: Base, plan_one: Callable[[RoundToPlan], Plan]) -> Plan:
    """Return the plan of a recipe with the work of all its rounds, and the memory of the first, which is the largest.

    ``plan``: that of the whole cut in one round; ``plan_one``: plans a round.
    """
    plans = []
    for own in round_recipes(recipe, base.anatomy):
        one = RoundToPlan(own, base, planned_cut(own, base.anatomy))
        plans.append(plan_one(one))
        base = _base_after(one)
    first, later = plans[0], plans[1:]
    repeated = [part for each in later for part in each.work.parts if part.step not in _WRITTEN_ONCE]
    return plan.model_copy(
        update={
            "memory": first.memory,
            "batch_sizes": first.batch_sizes,
            "devices": first.devices,
            "shortage": next((each.shortage for each in plans if each.shortage), None),
            "rounds": tuple(PlannedRound(size=each.pruned, tokens=_trained(each).tokens) for each in plans),
            "recovery": _of_all_rounds(plan, plans),
            "work": plan.work.model_copy(update={"parts": (*first.work.parts, *repeated)}),
        }
    )


def _base_after(one: RoundToPlan) -> Base:
    """Return the model after a round, which has no files yet."""
    base, trust = one.base, one.recipe.model.trust_remote_code
    config = cut_config(base.config, base.anatomy, kept=one.planned.sizes)
    model = build_meta_model(config, base.dense.dtype, trust_remote_code=trust)
    return Base(config, None, model, discover(config, trust), has_files=False)


def _of_all_rounds(whole: Plan, plans: Sequence[Plan]) -> RecoveryPlan:
    """Return the plan of all trainings together: the tokens of all, the memory of the largest.

    The disk holds the predictions for every round, and the checkpoint of the round before.
    """
    found = [_trained(plan) for plan in plans]
    first = found[0]
    predictions = sum((one.tokens or 0) * one.bytes_of_token for one in found[1:])
    update = {
        "memory": first.memory,
        "trained": first.trained,
        "windows_of_step": first.windows_of_step,
        "disk": first.disk + predictions + plans[0].disk,
    }
    if first.steps is not None and first.tokens is not None:
        update |= {"steps": first.steps * len(found), "tokens": first.tokens * len(found)}
    return _trained(whole).model_copy(update=update)


def _trained(plan: Plan) -> RecoveryPlan:
    assert plan.recovery is not None, "every round trains"
    return plan.recovery
