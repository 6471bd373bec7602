"""Notes on units without a refit, and on the cost of the refit."""

from __future__ import annotations

from llmprune.anatomy.types import Anatomy, routed_units
from llmprune.common.errors import RecipeError
from llmprune.planning.memory.passes import neurons_of_up_refit
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import EPOCHS, Refit
from llmprune.results.formatting import ranges


def about_refit(recipe: Recipe, anatomy: Anatomy, *, widths: dict[str, int]) -> list[str]:
    """Return notes on units without a refit and on its cost. Raises RecipeError where the recipe's have no effect."""
    if recipe.refit is None:
        return []
    samples = recipe.calibration.shape()[0]
    cuts = recipe.removes_parts
    notes = _about_units_without_refit(anatomy) if cuts else []
    if cuts or (recipe.sparsity and recipe.sparsity.method.refits):
        notes += _about_missing_folds(recipe.refit, samples)
    if recipe.refit.up:
        notes += _about_up_refit(anatomy, widths, samples=samples)
    if recipe.refit.block:
        notes += _about_training(samples)
    return notes


def _about_units_without_refit(anatomy: Anatomy) -> list[str]:
    """Return notes on units that are cut without a refit, and on layers without a refit of their MLP."""
    routed = [routed_units(anatomy, index) for index in range(anatomy.num_layers)]
    units = [(unit, own) for all_units, own in zip(anatomy.units, routed, strict=True) for unit in all_units]
    stacked = sorted({unit.path for unit, own in units if not unit.refit and unit not in own})
    without = [
        index for index, own in enumerate(anatomy.units) if not routed[index] and not any(unit.refit for unit in own)
    ]
    notes = [f"cut without refit, because not every token reaches them: {', '.join(stacked)}"] if stacked else []
    if without:
        layers = "its layers have" if len(without) == anatomy.num_layers else f"layers {ranges(without)} have"
        notes.append(
            f"{layers} no MLP that every token reaches: where layers or heads are removed, other projections that "
            "write to the residual stream are refit"
        )
    return notes


def _about_missing_folds(refit: Refit, samples: int) -> list[str]:
    """Return a note where one calibration window leaves nothing to hold out from the refit."""
    if samples > 1:
        return []
    strength = "the default ridge" if refit.ridge is None else f"ridge {refit.ridge:g}"
    return [
        f"refit: 1 calibration sample leaves no other to judge the refit on; it is made at {strength}, "
        "whether it helps or not"
    ]


def _about_up_refit(anatomy: Anatomy, widths: dict[str, int], *, samples: int) -> list[str]:
    """Return a note on the cost of ``refit.up``. Raises RecipeError where it refits nothing, or cannot be judged."""
    if not neurons_of_up_refit(anatomy, widths):
        gated = any(unit.up for units in anatomy.units for unit in units)
        raise RecipeError(
            "refit.up: only the up projections of gated MLPs that lose neurons and that every token reaches are refit, "
            f"and {'no neurons of these are removed' if gated else 'this model has none'}; "
            f"{'narrow them with width, or ' if gated else ''}remove the key"
        )
    if samples < 2:
        raise RecipeError(
            "refit.up: 1 calibration sample leaves no other to judge the refit on; raise calibration.samples, or "
            "remove the key"
        )
    return ["refit.up: pass 2 costs about 5 more forward passes in float32 over the calibration tokens"]


def _about_training(samples: int) -> list[str]:
    """Return a note on the cost of ``refit.block``. Raises RecipeError where no window is left to judge it."""
    if samples < 2:
        raise RecipeError(
            "refit.block: 1 calibration sample leaves no other to judge the training on; raise calibration.samples, or "
            "remove the key"
        )
    return [
        f"refit.block: pass 2 trains every layer for at most {EPOCHS} epochs, each as long as 3 forward passes over "
        "the calibration tokens"
    ]
