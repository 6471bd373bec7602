"""Memory that routed experts need in pass 2, from a model without weights."""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.anatomy.types import Anatomy, MlpUnit, routed_units
from llmprune.common.linalg.fold_sums import SKETCHED
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.refit import PASSES_OF_EXPERTS


def is_refit(recipe: Recipe) -> bool:
    """Check that routed experts are refit: something is cut, and no projection is refit while it is made sparse."""
    is_cut = bool(recipe.depth or recipe.width or recipe.experts)
    return is_cut and recipe.refit is not None and not (recipe.sparsity and recipe.sparsity.method.refits)


def widest_experts(anatomy: Anatomy, widths: Mapping[str, int]) -> tuple[MlpUnit, int] | None:
    """Return the routed experts with the most neurons kept, and these; None where there are none."""
    routed = [unit for layer in range(anatomy.num_layers) for unit in routed_units(anatomy, layer)]
    sized = [(unit, unit.times * widths.get(unit.field, unit.width // unit.times)) for unit in routed]
    return max(sized, key=lambda one: one[1], default=None)


def stored_values(recipe: Recipe, anatomy: Anatomy, *, hidden: int, itemsize: int) -> int:
    """Return the bytes stored for each calibration token of a layer.

    They are the hidden states that the experts get, and for the refit both parts of the error in float32.
    """
    if widest_experts(anatomy, {}) is None:
        return 0
    refit = is_refit(recipe)
    moments = recipe.sparsity is not None and recipe.sparsity.required_moments(recipe.refit is not None) != "nothing"
    return (refit or moments) * hidden * itemsize + refit * 2 * 4 * hidden


def refit_statistics(recipe: Recipe, anatomy: Anatomy, *, widths: Mapping[str, int], hidden: int, folds: int) -> int:
    """Return the bytes of the normal equations of the experts of one pass, and of the stacked output projections."""
    found = widest_experts(anatomy, widths)
    if found is None or not is_refit(recipe):
        return 0
    unit, width = found
    experts = unit.experts or 1
    each = folds * width * (width + 2 * min(hidden, SKETCHED)) + 2 * width * hidden
    return 4 * (-(-experts // PASSES_OF_EXPERTS) * each + width * width + experts * width * hidden)
