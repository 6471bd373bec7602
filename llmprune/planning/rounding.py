"""Wishes that rounding makes nothing of: a fraction near 1, or near 0 of weights, that removes not one part."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmprune.anatomy.types import Anatomy
from llmprune.cut.decision import round_width, width_step
from llmprune.planning.sparsity import SparsityPlan
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.width import Width
from llmprune.results.formatting import ranges

_STEP = 0.001  # of the fractions that are proposed


def wishes_without_effect(
    recipe: Recipe, anatomy: Anatomy, *, widths: Mapping[str, int], kv_groups: int | None, sparsity: SparsityPlan | None
) -> list[str]:
    """A sentence with the numbers and the remedy for each wish to remove something that removes nothing.

    ``widths`` (neurons kept, by config field) and ``kv_groups`` are what the wishes were rounded to. Who asks to keep
    everything gets what was asked for.
    """
    found: list[str] = []
    if recipe.width is not None:
        found += [
            said
            for field, kept in widths.items()
            if kept == anatomy.widths[field] and (said := _about_neurons(recipe.width, field, dense=kept))
        ]
        if anatomy.heads and kv_groups == anatomy.heads.count:
            found += _about_heads(recipe.width.heads, kv_groups, possible=anatomy.heads.possible)
    if sparsity is not None and not sparsity.zeros:
        found.append(
            f"sparsity: {sparsity.pattern} of the inputs of each output is less than half a weight in every matrix, "
            "so none becomes zero; raise it, or remove the section"
        )
    return found


def _about_neurons(width: Width, field: str, *, dense: int) -> str | None:
    step = width_step(dense)
    rounded = f"keeps all {dense:,} ({field}), for widths are rounded to multiples of {step}"
    if width.mlp is not None:
        if width.mlp >= 1:
            return None
        asked = f"width.mlp: {width.mlp:g} of {dense:,} neurons"
    else:
        number = width.neurons if isinstance(width.neurons, int) else (width.neurons or {})[field]
        if number >= dense:
            return None
        asked = f"width.neurons: {number:,} of {dense:,}"
    if dense == step:
        return f"{asked} {rounded}: this width cannot be narrowed; leave it out"
    most = _highest(lambda fraction: round_width(fraction * dense, dense) < dense)
    return f"{asked} {rounded}: ask for width.mlp {most:.3g} or less, or for width.neurons {dense - step} or less"


def _about_heads(wanted: int | float | None, count: int, *, possible: tuple[int, ...]) -> list[str]:
    if not isinstance(wanted, float) or wanted >= 1 or not possible:
        return []
    fewer = max(possible)
    most = _highest(lambda fraction: fraction * count - fewer < count - fraction * count)
    return [
        f"width.heads: {wanted:g} of {count} key-value groups keeps all {count}: ask for {most:.3g} or less, "
        f"or for a number of them: {ranges(possible)}"
    ]


def _highest(cuts: Callable[[float], bool]) -> float:
    """The highest fraction in steps of a thousandth that removes something."""
    return next(step * _STEP for step in range(round(1 / _STEP) - 1, 0, -1) if cuts(step * _STEP))
