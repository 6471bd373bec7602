"""Find settings that rounding leaves without effect: fractions so near 1, or 0, that nothing is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmprune.anatomy.types import Anatomy
from llmprune.planning.sizes.planned_sizes import PlannedCut
from llmprune.planning.sparsity import SparsityPlan
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.width import Width
from llmprune.recipe.width_rounding import round_width, width_step
from llmprune.results.formatting import ranges

_STEP = 0.001  # of the fractions that are proposed


def settings_without_effect(
    recipe: Recipe, anatomy: Anatomy, *, planned: PlannedCut, sparsity: SparsityPlan | None
) -> list[str]:
    """Return a sentence, with the numbers and the remedy, for each setting that asks to remove and removes nothing.

    A setting that asks to keep everything is not one of them.
    """
    found: list[str] = []
    if recipe.width is not None:
        found += _about_widths(recipe.width, planned.widths.kept, anatomy=anatomy)
        kv_groups = planned.heads.kv_groups
        if anatomy.heads and kv_groups == anatomy.heads.count:
            found += _about_heads(recipe.width.heads, kv_groups, possible=anatomy.heads.possible)
    if sparsity is not None and not sparsity.zeros:
        found.append(
            f"sparsity: {sparsity.pattern} of the inputs of each output is less than half a weight in every matrix, "
            "so no weight becomes zero; raise it, or remove the section"
        )
    return found


def _about_widths(width: Width, kept: Mapping[str, int], *, anatomy: Anatomy) -> list[str]:
    uncut = [field for field, neurons in kept.items() if neurons == anatomy.widths[field]]
    found = (_about_neurons(width, field, dense=kept[field]) for field in uncut)
    return [sentence for sentence in found if sentence]


def _about_neurons(width: Width, field: str, *, dense: int) -> str | None:
    step = width_step(dense, width.multiple)
    rounded = f"keeps all {dense:,} ({field}), because widths are rounded to multiples of {step}"
    if width.mlp is not None:
        if width.mlp >= 1:
            return None
        asked = f"width.mlp: {width.mlp:g} of {dense:,} neurons"
    else:
        number = width.neurons if isinstance(width.neurons, int) else (width.neurons or {})[field]
        if number >= dense:
            return None
        asked = f"width.neurons: {number:,} of {dense:,}"
    if dense <= step:
        return f"{asked} {rounded}: this width cannot be narrowed; leave it out"
    most = _highest(lambda fraction: round_width(fraction * dense, dense, multiple=width.multiple) < dense)
    fewer = (dense - 1) // step * step
    return f"{asked} {rounded}: ask for width.mlp {most:.3g} or less, or for width.neurons {fewer} or less"


def _about_heads(wanted: int | float | None, count: int, *, possible: tuple[int, ...]) -> list[str]:
    if not isinstance(wanted, float) or wanted >= 1 or not possible:
        return []
    fewer = max(possible)
    most = _highest(lambda fraction: fraction * count - fewer < count - fraction * count)
    return [
        f"width.heads: {wanted:g} of {count} key-value groups keeps all {count}: ask for {most:.3g} or less, "
        f"or for a number of them: {ranges(possible)}"
    ]


def _highest(removes_some: Callable[[float], bool]) -> float:
    """Return the highest fraction, in steps of a thousandth, that removes something."""
    return next(step * _STEP for step in range(round(1 / _STEP) - 1, 0, -1) if removes_some(step * _STEP))
