"""Plan which matrices of the cut layers get the sparsity pattern."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.anatomy.projections import projections_of
from llmprune.anatomy.stacked_projections import stacked_projections
from llmprune.anatomy.types import Anatomy, routed_units
from llmprune.common.errors import RecipeError
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.sparsity import select
from llmprune.results.formatting import ranges


@dataclass(frozen=True)
class SparsityPlan:
    """Number of matrices that get the pattern, of their weights and of the zeros among these.

    ``skipped``: matrices that the recipe selects and that cannot have the pattern, each with the reason.
    """

    pattern: str
    matrices: int
    weights: int
    zeros: int
    skipped: tuple[str, ...]


def planned_sparsity(
    recipe: Recipe, pruned: PreTrainedModel, *, anatomy: Anatomy, planned: PlannedCut
) -> SparsityPlan | None:
    """Select the matrices that get the pattern in the layers of the pruned model.

    Raises RecipeError where no matrix is selected, or where the calibration text is too short.
    """
    sparsity = recipe.sparsity
    if sparsity is None:
        return None
    layers, units = find_layers(pruned)[1], [routed_units(anatomy, layer) for layer in planned.layers]
    found = [(projections_of(layer), stacked_projections(layer, own)) for layer, own in zip(layers, units, strict=True)]
    selections = [select(projections, sparsity, experts=planned.experts) for projections, _ in found]
    stacked = [select(stacks, sparsity, experts=None) for _, stacks in found]
    names = sorted(
        {one.name for projections, _ in found for one in projections} | {one.name for _, own in found for one in own}
    )
    if unmatched := sparsity.unmatched(names):
        raise RecipeError(
            f"sparsity: {', '.join(map(repr, unmatched))} matches no matrix of this model's layers; they have "
            f"{', '.join(names)}"
        )
    chosen = [one for selection in selections for one in selection.chosen]
    stacks = [one for selection in stacked for one in selection.chosen]
    refused: dict[str, list[int]] = {}
    for index, both in enumerate(zip(selections, stacked, strict=True)):
        for name, reason in (*both[0].skipped.items(), *both[1].skipped.items()):
            refused.setdefault(f"{name}: {reason}", []).append(index)
    if not chosen and not stacks:
        reasons = "; ".join(refused) or "targets and skip select none"
        raise RecipeError(f"sparsity: no matrix of this model can have the pattern {sparsity.parsed}: {reasons}")
    if chosen and sparsity.required_moments(recipe.refit is not None) == "gram":
        _require_tokens(max(one.inputs for one in chosen), recipe.calibration.shape())
    sizes = [(one.outputs, one.inputs) for one in chosen]
    sizes += [(one.outputs * one.experts, one.inputs) for one in stacks]
    weights = sum(outputs * inputs for outputs, inputs in sizes)
    zeros = sum(outputs * (inputs - sparsity.parsed.kept_inputs(inputs)) for outputs, inputs in sizes)
    skipped = tuple(f"{reason} (in layers {ranges(where)})" for reason, where in refused.items())
    return SparsityPlan(str(sparsity.parsed), len(sizes), weights, zeros, skipped)


def _require_tokens(inputs: int, calibration: tuple[int, int]) -> None:
    windows, length = calibration
    if windows * length < inputs:
        raise RecipeError(
            f"calibration.samples: {windows * length:,} tokens are too few for the Gram matrix of {inputs:,} inputs, "
            f"which is singular with fewer than {inputs:,} tokens and stable with about ten times as many; take at "
            f"least {-(-inputs // length)} windows of {length} tokens, better {-(-10 * inputs // length)}, or choose "
            "sparsity.method wanda or magnitude without a refit"
        )
