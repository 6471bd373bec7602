"""Settle a recipe with a budget: state the numbers that a shape has in the sections that a run reads."""

from __future__ import annotations

from typing import Any

from llmprune.anatomy.types import Anatomy
from llmprune.common.schema import Section
from llmprune.cut.shape import Shape
from llmprune.recipe.budget import Axes
from llmprune.recipe.depth import Depth
from llmprune.recipe.experts import Experts
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.width import Width
from llmprune.results.shape_recipe import KeptUnits, sections_of_shape

_SECTIONS: dict[str, type[Section]] = {"depth": Depth, "width": Width, "experts": Experts}


def is_open(recipe: Recipe) -> bool:
    """Check that a recipe has a budget for which no shape is chosen yet."""
    return recipe.budget is not None and not (recipe.depth or recipe.width or recipe.experts)


def settled(recipe: Recipe, shape: Shape, *, anatomy: Anatomy, removed: tuple[int, ...] | None) -> Recipe:
    """Return the recipe that cuts its model to a shape, with its budget beside the numbers of the shape.

    ``removed``: indices of the layers to remove; None where they are not chosen, as in a plan.
    """
    assert recipe.budget is not None, "a shape is chosen for a budget"
    kept = KeptUnits(
        removed=anatomy.num_layers - shape.layers if removed is None else removed,
        widths=shape.neurons,
        dense_widths=anatomy.widths,
        kv_groups=shape.kv_groups if anatomy.heads and shape.kv_groups != anatomy.heads.count else None,
        experts=shape.experts if anatomy.experts and shape.experts != anatomy.experts.count else None,
    )
    values = sections_of_shape(kept, axes=_settings(recipe.budget.axes))
    if removed is None and "depth" in values:  # pass 1 scores them for a quick search; others order them by themselves
        values["depth"]["criterion"] = {"kind": "block_influence"}
    update = {
        name: section.model_validate(values[name]) if name in values else None for name, section in _SECTIONS.items()
    }
    return recipe.with_chosen(update)


def _settings(axes: Axes | None) -> dict[str, dict[str, Any]]:
    """Return the settings that a recipe gives for each axis."""
    named = {name: getattr(axes, name) for name in axes.named} if axes else {}
    return {name: {key: getattr(axis, key) for key in axis.model_fields_set} for name, axis in named.items()}
