"""The layers and units that a recipe keeps."""

from __future__ import annotations

from llmprune.anatomy.types import Anatomy
from llmprune.planning.checks import ErrorCollector
from llmprune.planning.sizes.planned_hidden import planned_hidden
from llmprune.planning.sizes.planned_layers import planned_layers
from llmprune.planning.sizes.planned_sizes import (
    PlannedCut,
    planned_experts,
    planned_heads,
    planned_widths,
)
from llmprune.recipe.recipe import Recipe


def planned_cut(recipe: Recipe, anatomy: Anatomy) -> PlannedCut:
    """Return the layers and units that a recipe keeps. Raises RecipeError for what the model does not allow."""
    return PlannedCut(
        planned_layers(recipe.depth, anatomy),
        planned_widths(recipe.width, anatomy),
        planned_experts(recipe.experts, anatomy),
        planned_heads(recipe.width, anatomy),
        planned_hidden(recipe, anatomy),
    )


def collect_planned_cut(recipe: Recipe, anatomy: Anatomy, *, errors: ErrorCollector) -> PlannedCut | None:
    """Return the layers and units that a recipe keeps; None where the errors of one or more sections are collected."""
    model = "model"
    _, keep = errors.attempt("depth", ("depth", model), work=lambda: planned_layers(recipe.depth, anatomy))
    _, widths = errors.attempt("width", ("width", model), work=lambda: planned_widths(recipe.width, anatomy))
    mixtures, kept_experts = errors.attempt(
        "experts", ("experts", model), work=lambda: planned_experts(recipe.experts, anatomy)
    )
    _, kept_heads = errors.attempt("width.heads", ("width", model), work=lambda: planned_heads(recipe.width, anatomy))
    reads = ("hidden", "sparsity", "recover", model)
    _, hidden = errors.attempt("hidden", reads, work=lambda: planned_hidden(recipe, anatomy))
    if keep is None or widths is None or kept_heads is None or hidden is None or not mixtures:
        return None
    return PlannedCut(keep, widths, kept_experts, kept_heads, hidden)
