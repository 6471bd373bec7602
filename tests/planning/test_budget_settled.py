"""Recipes settled to a shape: their sections say what a run cuts, and their budget stays beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.budgets import base_of, budget_recipe

from llmprune.cut.shape import Shape
from llmprune.planning.base import Base
from llmprune.planning.budget.settle import is_open, settled
from llmprune.planning.budget.sizes import ShapeCounter
from llmprune.planning.sizes.planned_cut import planned_cut
from llmprune.testing import tiny_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Four layers with experts and shared experts, whose MLPs have different widths."""
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 192}
    return base_of(tmp_path_factory.mktemp("qwen2_moe"), tiny_config("qwen2_moe", **sizes))


def test_a_settled_recipe_cuts_to_its_shape(base: Base) -> None:
    """Named layers, neurons of each field without further rounding, groups and experts; each with its criterion."""
    axes = "{layers: {}, mlp: {criterion: {kind: activation}}, heads: {criterion: {kind: share}}, experts: {}}"
    recipe = budget_recipe(Path("model"), f"{{parameters: 0.5, axes: {axes}}}")
    widths = (("moe_intermediate_size", 48), ("shared_expert_intermediate_size", 80))
    own = settled(recipe, Shape(2, widths, 1, 3), anatomy=base.anatomy, removed=(1, 2))
    cut = planned_cut(own, base.anatomy)
    assert (cut.layers, cut.widths.kept, cut.heads.kv_groups, cut.experts) == ((0, 3), dict(widths), 1, 3)
    assert not cut.notes
    assert own.layer_criterion is None
    assert own.width is not None
    assert (own.width.neuron_criterion.kind, own.width.head_criterion.kind) == ("activation", "share")
    assert (own.budget, own.text, own.calibration) == (recipe.budget, recipe.text, recipe.calibration)
    assert is_open(recipe)
    assert not is_open(own)


def test_rounds_can_divide_a_width(base: Base) -> None:
    """The widths of a shape are multiples of a step that rounds go by, not of themselves."""
    widths = (("moe_intermediate_size", 64), ("shared_expert_intermediate_size", 160))
    for budget, multiple in (("{parameters: 0.5}", 32), ("{parameters: 0.5, axes: {mlp: {multiple: 16}}}", 16)):
        recipe = budget_recipe(Path("model"), budget)
        own = settled(recipe, replace(ShapeCounter(base).dense, widths=widths), anatomy=base.anatomy, removed=())
        assert own.width is not None
        assert own.width.multiple == multiple


@pytest.mark.parametrize("removed", [None, (0, 1)])
def test_what_a_shape_keeps_has_no_section(base: Base, removed: tuple[int, ...] | None) -> None:
    """A shape that gives layers alone has neither widths nor experts; a plan leaves open which layers."""
    recipe = budget_recipe(Path("model"), "{parameters: 0.5}")
    dense = ShapeCounter(base).dense
    own = settled(recipe, replace(dense, layers=2), anatomy=base.anatomy, removed=removed)
    assert own.depth is not None
    assert (own.depth.remove, own.depth.layers) == (None if removed else 2, removed)
    assert (own.width, own.experts) == (None, None)
    heads = settled(recipe, replace(dense, kv_groups=1), anatomy=base.anatomy, removed=())
    assert heads.depth is None
    assert heads.width is not None
    assert (heads.width.neurons, heads.width.heads, heads.width.head_criterion.kind) == (None, 1, "activation")
