"""Sizes of shapes that no model is built for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.budgets import base_of, budget_recipe

from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import build_meta_model, find_layers
from llmprune.anatomy.types import IndexKinds
from llmprune.checkpoint.loading import load_config
from llmprune.cut.apply import cut_config
from llmprune.cut.shape import Shape
from llmprune.planning.base import describe_base
from llmprune.planning.budget.sizes import ShapeCounter, ShapeSizes
from llmprune.planning.sizes.model_size import measure_size
from llmprune.planning.sizes.planned_layers import planned_layers
from llmprune.recipe.depth import Depth
from llmprune.results.figures.model_size import Size
from llmprune.testing import tiny_config, tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe", "granitemoehybrid"])
def test_sizes_of_a_shape_are_those_of_the_model_that_is_built(family: str, tmp_path: Path) -> None:
    """Parameters, bytes and cache equal those of a model with the shape's config, whatever is smaller in it."""
    base = base_of(tmp_path, tiny_config(family))
    counter, anatomy = ShapeCounter(base), base.anatomy
    dense = counter.dense
    half = tuple((field, width // 2) for field, width in dense.widths)
    assert anatomy.heads is not None
    fewer = Shape(2, half, anatomy.heads.count // 2, anatomy.experts.top_k if anatomy.experts else None)
    assert _measured(counter.sizes(dense)) == _measured(base.size)
    for shape in (Shape(3, dense.widths, dense.kv_groups, dense.experts), fewer):
        keep = planned_layers(Depth(keep=shape.layers), anatomy)
        kept = KeptSizes(keep, shape.neurons, shape.experts, shape.kv_groups)
        built = build_meta_model(cut_config(base.config, anatomy, kept=kept), base.dense.dtype)
        size = measure_size(built, kept, stored={})
        assert _measured(counter.sizes(shape)) == _measured(size), shape.name


def _measured(sizes: ShapeSizes | Size) -> tuple[int, int, int | None]:
    return sizes.parameters, sizes.bytes, sizes.kv_bytes_per_token


def test_sizes_of_unequal_layers_depend_on_which_are_kept(tmp_path: Path) -> None:
    """Attention and Mamba layers differ in size: a count without indices is that of a removal from the middle."""
    base = base_of(tmp_path, tiny_config("granitemoehybrid"))
    counter = ShapeCounter(base)
    shape = Shape(2, counter.dense.widths, counter.dense.kv_groups, counter.dense.experts)
    middle, mamba, attention = (counter.sizes(shape, layers=layers) for layers in (None, (0, 2), (1, 3)))
    assert not counter.is_exact
    counter.anatomy = replace(base.anatomy, by_index=(IndexKinds("class", ("mamba", "attention") * 2),))
    assert counter.is_exact
    counter.anatomy = base.anatomy
    assert middle == counter.sizes(shape, layers=planned_layers(Depth(remove=2), base.anatomy))
    assert (mamba.kv_bytes_per_token, mamba.parameters) != (attention.kv_bytes_per_token, attention.parameters)
    _, layers = find_layers(base.dense)
    removed = sum(parameter.numel() for index in (0, 2) for parameter in layers[index].parameters())
    assert attention.parameters == counter.sizes(counter.dense).parameters - removed


def test_a_token_uses_only_the_experts_that_it_is_routed_to(tmp_path: Path) -> None:
    """Two experts of each layer and their rows of the router are active, whatever the number of experts."""
    base = base_of(tmp_path, tiny_config("mixtral"))
    counter = ShapeCounter(base)
    names = {tensor.name for block in base.anatomy.blocks if block for tensor in block.tensors}
    tensors = [dict(layer.named_parameters()) for layer in find_layers(base.dense)[1]]
    expert = sum(of_layer[name][0].numel() for of_layer in tensors for name in names)
    dense = counter.dense
    for kept in (4, 3, 2):
        sizes = counter.sizes(Shape(dense.layers, dense.widths, dense.kv_groups, kept))
        assert sizes.active_parameters == sizes.parameters - (kept - 2) * expert


def test_bytes_are_those_of_the_types_in_the_files(tmp_path: Path) -> None:
    """A model that is loaded in another type than its files have keeps theirs."""
    tiny_model("llama").half().save_pretrained(tmp_path)
    recipe = budget_recipe(tmp_path, "{parameters: 0.5}")
    base = describe_base(recipe, load_config(recipe.model))
    sizes = ShapeCounter(base).sizes(ShapeCounter(base).dense)
    assert sizes.bytes == base.size.bytes == 2 * sizes.parameters
