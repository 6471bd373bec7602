"""Candidate shapes of a budget: which there are, which are tried, and budgets that cannot be met."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from helpers.budgets import base_of, space_of

from llmprune.anatomy.types import IndexKinds
from llmprune.common.errors import RecipeError
from llmprune.cut.shape import Shape
from llmprune.planning.budget.candidates import candidates, one_step_further
from llmprune.planning.budget.sizes import ShapeCounter
from llmprune.planning.budget.space import Place, SearchSpace, moved
from llmprune.testing import tiny_config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ShapeCounter:
    """Eight layers, MLPs of 256 neurons, four key-value groups."""
    sizes = {"num_hidden_layers": 8, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    return ShapeCounter(base_of(tmp_path_factory.mktemp("llama"), tiny_config("llama", **sizes)))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ShapeCounter:
    """Four layers with four experts, of which a token uses two."""
    return ShapeCounter(base_of(tmp_path_factory.mktemp("mixtral"), tiny_config("mixtral")))


def _all_places(space: SearchSpace) -> list[Place]:
    layers, widths, groups, experts = map(range, space.lengths)
    return list(product(layers, widths, groups, experts))


def _shapes(space: SearchSpace) -> set[Shape]:
    return {one.shape for one in candidates(space, space.members[0]).found}


@pytest.mark.parametrize("budget", ["parameters: 0.75", "parameters: 0.7, kv_cache: 0.9", "weights: 0.6"])
def test_candidates_are_all_shapes_that_could_not_be_larger(llama: ShapeCounter, budget: str) -> None:
    """A shape is a candidate if it meets the limits, is near one, and no step along an axis would meet them."""
    space = space_of(llama, f"{{{budget}, tolerance: 0.1}}")
    limits = space.members[0]
    names = {"parameters": "parameters", "weights": "bytes", "kv_cache": "kv_bytes_per_token"}

    def used(place: Place) -> float:
        sizes = llama.sizes(space.shape(place))
        return max(getattr(sizes, names[name]) / limit for name, limit in limits.items())

    def larger(place: Place) -> list[Place]:
        return [moved(place, axis, steps=-1) for axis in range(4) if place[axis]]

    expected = {
        space.shape(place)
        for place in _all_places(space)
        if 0.9 <= used(place) <= 1 and all(used(one) > 1 for one in larger(place))
    }
    assert len(expected) > 1
    assert _shapes(space) == expected


def test_the_axes_have_fine_steps_and_stop_at_their_limits(llama: ShapeCounter) -> None:
    """Half of layers and groups stay by default, 0.4 of the neurons; a step of the width is 1 % of a model, or 32."""
    values = space_of(llama, "{parameters: 0.75}").values
    assert values.layers == (8, 7, 6, 5, 4)
    assert [width for ((_, width),) in values.widths] == [256, 224, 192, 160, 128]
    assert values.kv_groups == (4, 2)
    own = space_of(
        llama, "{parameters: 0.75, axes: {layers: {at_least: 6}, mlp: {multiple: 96, at_least: 0.3}}}"
    ).values
    assert own.layers == (8, 7, 6)
    assert [width for ((_, width),) in own.widths] == [256, 192, 96]
    assert own.kv_groups == (4,)


def test_layers_of_kinds_by_index_are_removed_in_whole_groups(llama: ShapeCounter) -> None:
    """The search asks for numbers that whole groups leave."""
    periodic = copy(llama)
    periodic.anatomy = replace(llama.anatomy, by_index=(IndexKinds("class", tuple("abb" * 2 + "ab")),))
    assert space_of(periodic, "{parameters: 0.75, axes: {layers: {at_least: 1}}}").values.layers == (8, 5, 2)


def test_a_family_has_limits_from_the_largest_in_absolute_numbers(llama: ShapeCounter) -> None:
    """Values may come in any order, as fractions or numbers; limits that are no list hold for every model."""
    dense = llama.sizes(llama.dense)
    space = space_of(llama, "{parameters: [0.6, 0.9], weights: 200KB}")
    assert space.members == (
        {"parameters": 0.9 * dense.parameters, "weights": 200_000},
        {"parameters": 0.6 * dense.parameters, "weights": 200_000},
    )
    quantised = space_of(llama, "{weights: 0.5, weight_bits: 4}").members
    assert quantised == ({"weights": dense.parameters / 4},)
    assert [one["speed"] for one in space_of(llama, "{speed: [2, 1.5]}").members] == [1.5, 2.0]


def test_few_shapes_span_every_axis(llama: ShapeCounter) -> None:
    """Single axes and half each of layers and neurons are always tried; the rest is spread over layers and groups."""
    text = "parameters: 0.65, tolerance: 0.15, axes: {layers: {}, mlp: {multiple: 16}, heads: {}}"
    space = space_of(llama, f"{{{text}, shapes: 6}}")
    found = candidates(space, space.members[0])
    dense = space.dense
    tried = [one.shape for one in found.tried]
    assert len(tried) == 6 < len(found.found)
    assert set(tried) <= {one.shape for one in found.found}
    alone = [one.shape for one in found.found if one.cut_axes == 1]
    assert {(one.layers < 8, one.widths != dense.widths) for one in alone} == {(True, False), (False, True)}
    assert set(alone) <= set(tried)
    assert any(one.layers < 8 and one.widths != dense.widths and one.kv_groups == 4 for one in tried)
    assert {one.kv_groups for one in tried} == {one.shape.kv_groups for one in found.found}
    assert {one.layers for one in tried} == {8, 7, 6, 5}
    assert candidates(space_of(llama, f"{{{text}, shapes: 6}}"), space.members[0]).tried == found.tried
    fewest = space_of(llama, f"{{{text}, shapes: 2}}")
    assert len(candidates(fewest, fewest.members[0]).tried) == 2
    everything = space_of(llama, f"{{{text}, shapes: 200}}")
    assert candidates(everything, everything.members[0]).tried == found.found


def test_the_nominal_shape_cuts_all_that_can_be_cut(llama: ShapeCounter) -> None:
    """A plan of it counts the cost of every axis."""
    space = space_of(llama, "{parameters: 0.6, tolerance: 0.1}")
    nominal = candidates(space, space.members[0]).nominal
    assert nominal.cut_axes == 3


def test_a_predicted_speed_is_a_limit(llama: ShapeCounter) -> None:
    """A shape must be predicted to be as fast as asked; without a prediction the limit is left out."""
    space = space_of(llama, "{parameters: 0.8, speed: 1.5, tolerance: 0.1}")

    def speed(shape: Shape) -> float:
        return 8 / shape.layers

    found = candidates(space, space.members[0], speed=speed)
    assert {one.shape.layers for one in found.found} == {5}
    assert {one.speed for one in found.found} == {8 / 5}
    assert {one.shape.layers for one in candidates(space, space.members[0]).found} != {5}
    with pytest.raises(RecipeError, match=r"budget.speed: 1.50× the dense model's speed cannot be reached.*1.20×"):
        candidates(space, space.members[0], speed=lambda shape: 1.2)


def test_one_step_further_along_each_axis(llama: ShapeCounter) -> None:
    """The next smaller value of each axis alone, where there is one."""
    space = space_of(llama, "{parameters: 0.75}")
    steps = one_step_further(space, Shape(6, (("intermediate_size", 192),), 2, None))
    assert {axis: one.shape.name for axis, one in steps.items()} == {
        "layers": "5 layers, 192 neurons, 2 groups",
        "mlp": "6 layers, 160 neurons, 2 groups",
    }


def test_experts_are_an_axis_and_active_parameters_a_limit(mixture: ShapeCounter) -> None:
    """Fewer experts shrink the model without its active parameters; a criterion must be able to score neurons."""
    space = space_of(mixture, "{parameters: 0.6, tolerance: 0.2}")
    assert space.axes == ("layers", "mlp", "heads", "experts")
    assert {one.shape.experts for one in candidates(space, space.members[0]).found} >= {2, 3}
    active = space_of(mixture, "{active_parameters: 0.8, tolerance: 0.2}")
    assert {one.shape.experts for one in candidates(active, active.members[0]).found} == {4}
    with pytest.raises(RecipeError, match=r"budget.axes.mlp.criterion: taylor cannot score the neurons of intermed"):
        space_of(mixture, "{parameters: 0.8, axes: {mlp: {criterion: {kind: taylor}}}}")


def test_several_widths_shrink_by_one_fraction(tmp_path: Path) -> None:
    """Dense and shared MLPs of a mixture are narrowed together, each in its own multiples."""
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
    counter = ShapeCounter(base_of(tmp_path, tiny_config("qwen2_moe", **sizes)))
    widths = [dict(one) for one in space_of(counter, "{parameters: 0.7}").values.widths]
    assert widths[0] == sizes
    assert {(one["moe_intermediate_size"], one["shared_expert_intermediate_size"]) for one in widths} == {
        (64, 128),
        (32, 64),
        (64, 96),
    }


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ("{parameters: 1B}", r"budget.parameters: the dense model, with .* meets 1 B parameters, so there is nothing"),
        (
            "{parameters: 0.1}",
            r"0.1 of the dense model's\) cannot be reached; the nearest is .* with 4 layers, 128 neu",
        ),
        ("{kv_cache: 0.5, axes: [mlp]}", r"none of the axes mlp makes it smaller \(not used: layers, heads, experts\)"),
        ("{kv_cache: 0.1}", "axes.layers keeps at least 4 layers, axes.heads keeps at least 2 KV groups "),
        ("{active_parameters: 0.5}", "active_parameters: every token uses all parameters of this model"),
        ("{parameters: 0.9, axes: [experts]}", "budget.axes.experts: this model cannot give it: it has no mixture"),
        ("{parameters: 0.9, axes: {layers: {at_least: 8}}}", "axes.layers: at least 8 of 8 layers are kept, so that"),
        ("{parameters: 0.9, axes: {heads: {at_least: 9}}}", "axes.heads: at least 9 of 4 key-value groups are kept"),
        (
            "{parameters: 0.9, axes: {mlp: {multiple: 512}}}",
            "axes.mlp: at least 40% of 256 neurons in multiples of 512 are kept, .*; lower at_least or multiple, or",
        ),
        (
            "{kv_cache: 0.05, axes: {layers: {at_least: 1}, heads: {at_least: 2}}, tolerance: 0.01}",
            "axes.layers keeps at least 1 layer, axes.heads keeps at least 2 KV groups ",
        ),
        ("{parameters: [0.5, 127248]}", "parameters: two values are the same number for this model"),
        ("{parameters: 0.95, axes: [layers], tolerance: 0.01}", "within 0.01 of .*: the steps of the axes are coarse"),
    ],
)
def test_budgets_that_this_model_cannot_meet(llama: ShapeCounter, budget: str, problem: str) -> None:
    """The message says what cannot be had, what the nearest is, and which axis stops it."""
    with pytest.raises(RecipeError, match=problem):
        _shapes(space_of(llama, budget))


def test_limits_that_contradict_each_other(llama: ShapeCounter) -> None:
    """Each can be met alone within the tolerance, and not together."""
    space = space_of(llama, "{parameters: 0.79, kv_cache: 0.44, axes: [layers, heads], tolerance: 0.05}")
    with pytest.raises(RecipeError, match="can each be met alone, not together; the nearest that can be had is"):
        _shapes(space)


def test_a_model_without_a_cache_has_no_limit_for_it(tmp_path: Path) -> None:
    """A Mamba model keeps a state of constant size."""
    mamba = ShapeCounter(base_of(tmp_path, tiny_config("mamba")))
    with pytest.raises(RecipeError, match=r"budget.kv_cache: this model has no key-value cache"):
        space_of(mamba, "{kv_cache: 0.5}")
    with pytest.raises(RecipeError, match=r"budget.axes.heads: this model cannot give it: its config counts no att"):
        space_of(mamba, "{parameters: 0.5, axes: [heads]}")
