"""Notes on the cost and the assumptions of the criteria, on the layers' pattern, and the disk that scores need."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.anatomy.types import Anatomy
from llmprune.common.errors import RecipeError
from llmprune.common.schema import format_size
from llmprune.criteria.base import AblationCost, DepthCriterion
from llmprune.planning.next_tools.tool_compatibility import about_depth
from llmprune.planning.notes.index_kinds import about_index_kinds
from llmprune.recipe.recipe import Recipe
from llmprune.results.formatting import plural


def about_scores(recipe: Recipe, anatomy: Anatomy, *, keep: Sequence[int]) -> list[str]:
    """Return notes on the cost and the assumptions of the criteria, and on the layers' pattern."""
    notes = []
    if recipe.depth:
        if recipe.depth.layers is None:
            criterion, (windows, length) = recipe.depth.criterion, recipe.calibration.shape()
            remove = anatomy.num_layers - len(keep)
            cost = criterion.ablation_cost(anatomy.num_layers, remove=remove, windows=windows, length=length)
            notes += _about_ablation(criterion, cost) if cost else []
        named, kept = recipe.depth.layers is not None, recipe.depth.keep_pattern
        notes += about_index_kinds(recipe.depth, anatomy, keep=keep)
        notes += about_depth(anatomy, keep, named=named, keep_pattern=kept)
    return notes + _about_width_criterion(recipe, anatomy)


def _about_ablation(criterion: DepthCriterion, cost: AblationCost) -> list[str]:
    """Return a note on the cost of a depth criterion that runs the model without each layer."""
    refit = ", and a refit of every layer in each round" if cost.refits else ""
    return [
        f"depth.criterion {criterion.kind}: {plural(cost.rounds, 'round')} of ablation on "
        f"{plural(cost.windows, 'window')} of {cost.length:,} tokens cost about {cost.forward_passes:.1f} forward "
        f"passes over the calibration tokens{refit}"
    ]


def _about_width_criterion(recipe: Recipe, anatomy: Anatomy) -> list[str]:
    """Return notes on the cost of the width criterion, and on a refit that it assumes and the recipe lacks."""
    if recipe.width is None:
        return []
    criterion = recipe.width.neuron_criterion
    widths = [
        unit.times * anatomy.widths[unit.field] for units in anatomy.units for unit in units if recipe.width.cuts_mlp
    ]
    operations = recipe.calibration.scored_sources * sum(criterion.operations(width) for width in widths)
    figure = f": about {operations:.1e} operations in float64 in all" if operations else ""
    notes = [f"width.criterion {criterion.kind} {criterion.cost_note}{figure}"] if criterion.cost_note else []
    if criterion.assumes_refit and recipe.refit is None:
        notes.append(f"width.criterion {criterion.kind} assumes the refit, which is off")
    return notes


def require_disk_for_hidden_states(recipe: Recipe, window_bytes: int) -> None:
    """Raise RecipeError where a width criterion's backward pass needs more hidden states than may be stored.

    ``window_bytes``: of the dense hidden states of one calibration window after every layer.
    """
    allowed, needed = recipe.calibration.stream_disk, window_bytes * recipe.calibration.shape()[0]
    if recipe.width and recipe.width.neuron_criterion.forward_criterion is None and needed > allowed:
        raise RecipeError(
            f"calibration.stream_disk: the backward pass of width.criterion {recipe.width.neuron_criterion.kind} needs "
            f"the hidden states after every layer, {format_size(needed)}, and {format_size(allowed)} are allowed; "
            "raise it, take fewer calibration.samples, or choose another criterion"
        )
