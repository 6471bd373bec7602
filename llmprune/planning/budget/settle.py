"""Settle a recipe with a budget: state the numbers that a shape has in the sections that a run reads."""

from __future__ import annotations

from collections.abc import Iterable

from llmprune.anatomy.types import Anatomy
from llmprune.cut.shape import Shape
from llmprune.recipe.budget import Axes, ExpertsAxis, HeadsAxis, MlpAxis
from llmprune.recipe.depth import Depth
from llmprune.recipe.experts import Experts
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.width import Width
from llmprune.recipe.width_rounding import width_step


def is_open(recipe: Recipe) -> bool:
    """Check that a recipe has a budget for which no shape is chosen yet."""
    return recipe.budget is not None and not (recipe.depth or recipe.width or recipe.experts)


def settled(recipe: Recipe, shape: Shape, *, anatomy: Anatomy, removed: tuple[int, ...] | None) -> Recipe:
    """Return the recipe that cuts its model to a shape, with its budget beside the numbers of the shape.

    ``removed``: indices of the layers to remove; None where they are not chosen, as in a plan.
    """
    assert recipe.budget is not None, "a shape is chosen for a budget"
    axes = recipe.budget.axes
    update = {
        "depth": _depth(anatomy.num_layers - shape.layers, removed),
        "width": _width(shape, anatomy, axes=axes),
        "experts": _experts(shape, anatomy, axes=axes),
    }
    return recipe.with_chosen(update)


def _depth(number: int, removed: tuple[int, ...] | None) -> Depth | None:
    if not number:
        return None
    return Depth(remove=number) if removed is None else Depth(layers=removed)


def _width(shape: Shape, anatomy: Anatomy, *, axes: Axes | None) -> Width | None:
    mlp = (axes and axes.mlp) or MlpAxis()
    neurons = {field: kept for field, kept in shape.widths if kept < anatomy.widths[field]}
    heads = shape.kv_groups if anatomy.heads and shape.kv_groups != anatomy.heads.count else None
    if not neurons and heads is None:
        return None
    return Width(
        neurons=neurons or None,
        heads=heads,
        multiple=_multiple(mlp, neurons.values()) if neurons else "auto",
        criterion=mlp.criterion if neurons else None,
        heads_criterion=((axes and axes.heads) or HeadsAxis()).criterion if heads is not None else None,
    )


def _multiple(mlp: MlpAxis, kept: Iterable[int]) -> int:
    """Return the step of a search: as the recipe says, or one that leaves the widths as they are."""
    return mlp.multiple if mlp.multiple != "auto" else min(map(width_step, kept))


def _experts(shape: Shape, anatomy: Anatomy, *, axes: Axes | None) -> Experts | None:
    if anatomy.experts is None or shape.experts in (None, anatomy.experts.count):
        return None
    return Experts(keep=shape.experts, criterion=((axes and axes.experts) or ExpertsAxis()).criterion)
