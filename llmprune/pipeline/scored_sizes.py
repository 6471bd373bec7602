"""What a run scores and to which sizes it cuts, from its recipe and plan."""

from __future__ import annotations

from llmprune.criteria.ablation import AblationCriterion
from llmprune.pipeline.context import RunContext
from llmprune.recipe.recipe import Recipe
from llmprune.score.inputs import DepthTarget, ScoringCriteria
from llmprune.score.select import PlannedSizes


def planned_sizes(context: RunContext) -> PlannedSizes:
    """Return the sizes that the plan sets for the cut."""
    plan = context.plan
    return PlannedSizes(
        removed_layers=plan.removed_layers,
        keep_layers=plan.keep_layers,
        widths=plan.keep_widths,
        num_experts=plan.keep_experts,
        kv_groups=plan.keep_kv_groups,
        hidden_size=plan.keep_hidden,
        merge_experts=_merges_experts(context.recipe),
        keep_pattern=keeps_pattern(context.recipe),
    )


def criteria_in(context: RunContext) -> ScoringCriteria:
    """Return the criteria of a run, or of its search."""
    return criteria_of(context.recipe) if context.search is None else context.search.criteria


def criteria_of(recipe: Recipe) -> ScoringCriteria:
    """Return the criteria of all that a recipe cuts by scores."""
    width = recipe.width
    return ScoringCriteria(
        depth=recipe.layer_criterion,
        width=width.neuron_criterion if width and width.cuts_mlp else None,
        heads=width.head_criterion if width and width.heads is not None else None,
        experts=recipe.experts.criterion if recipe.experts else None,
        hidden=recipe.hidden is not None,
        merges_experts=_merges_experts(recipe),
    )


def depth_target(context: RunContext) -> DepthTarget:
    """Return how many layers the plan removes."""
    return DepthTarget(context.plan.dense.layers - context.plan.keep_layers, keeps_pattern(context.recipe))


def _merges_experts(recipe: Recipe) -> bool:
    return recipe.experts is not None and recipe.experts.method == "merge"


def keeps_pattern(recipe: Recipe) -> bool:
    """Return True where only layers may go after which the period of their kinds holds."""
    return bool(recipe.depth and recipe.depth.keep_pattern)


def ablates(context: RunContext) -> bool:
    """Return True where layers are scored by ablation, after pass 1."""
    return isinstance(criteria_in(context).depth, AblationCriterion)
