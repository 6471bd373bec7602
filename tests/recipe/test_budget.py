"""The recipe's section on the size that a model must reach."""

from __future__ import annotations

import pytest
from helpers.recipes import BASE, problems

from llmprune.recipe.budget import Budget
from llmprune.recipe.recipe import Recipe


def _budget(text: str) -> Budget:
    found = Recipe.parse(f"{BASE}budget: {text}\n").budget
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("{parameters: 0.75}", {"parameters": (0.75,)}),
        ("{parameters: 6e9}", {"parameters": (6_000_000_000,)}),
        ("{parameters: 6.5B, kv_cache: 80KB}", {"parameters": (6_500_000_000,), "kv_cache": (80_000,)}),
        ("{weights: 12GB, weight_bits: 4}", {"weights": (12_000_000_000,)}),
        ("{parameters: [0.8, 100M, 0.9]}", {"parameters": (0.8, 100_000_000, 0.9)}),
        ("{speed: [1.5, 2], batch_size: 8}", {"speed": (1.5, 2.0)}),
    ],
)
def test_limits_are_fractions_or_amounts(text: str, limits: dict[str, tuple[float, ...]]) -> None:
    """A number below 1 is a fraction of the dense model's, another one an amount; a list has one for each model."""
    found = _budget(text).limits
    assert found == limits
    assert [type(one) for values in found.values() for one in values] == [
        type(one) for values in limits.values() for one in values
    ]


@pytest.mark.parametrize("text", ["[mlp, layers]", "{layers: {}, mlp: {}}", "{layers: true, mlp: {at_least: 0.4}}"])
def test_axes_are_named_in_several_ways(text: str) -> None:
    """An axis without settings is a name in a list, an empty mapping, or true."""
    axes = _budget(f"{{parameters: 0.5, axes: {text}}}").axes
    assert axes is not None
    assert axes.named == ("layers", "mlp")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "budget: needs at least one of parameters, active_parameters, weights, kv_cache, speed"),
        ("0.75", "budget: must be a mapping of keys, not 0.75; its keys: parameters,"),
        ("{parameters: 1.0}", "budget.parameters: must be a fraction of the dense model's such as 0.75, or a number"),
        ("{parameters: 1.5}", "budget.parameters: must be a fraction"),
        ("{parameters: 75%}", "budget.parameters: must be a fraction"),
        ("{parameters: -0.5}", "budget.parameters: must be a fraction"),
        ("{parameters: true}", "budget.parameters: must be a fraction"),
        ("{parameters: []}", "budget.parameters: must be a fraction"),
        ("{parameters: [0.9, small]}", "budget.parameters.1: must be a fraction"),
        ("{kv_cache: 80 apples}", "budget.kv_cache: must be a fraction of the dense model's such as 0.75, or a size"),
        ("{speed: 0.9}", "budget.speed: must be above 1.0"),
        ("{parameters: [0.9, 0.9]}", "budget: parameters has a value twice"),
        ("{parameters: [0.9, 0.8], kv_cache: [0.9, 0.8]}", "budget: parameters and kv_cache are lists; only one"),
        (
            "{parameters: 0.9, weight_bits: 4}",
            "budget: weight_bits says how weights are counted",
        ),
        ("{parameters: 0.9, batch_size: 4}", "budget: batch_size says how speed is measured, and speed is not given"),
        ("{parameters: 0.9, axes: {}}", "budget.axes: name at least one of layers, mlp, heads, experts"),
        ("{parameters: 0.9, axes: []}", "budget.axes: name at least one of layers, mlp, heads, experts"),
        ("{parameters: 0.9, axes: {layers: }}", "budget.axes: layers has no value; write layers: {} to use"),
        ("{parameters: 0.9, axes: [layer]}", "budget.axes.layer: unknown key; did you mean 'layers'?"),
        ("{parameters: 0.9, axes: {mlp: {at_least: 1.5}}}", "budget.axes.mlp.at_least: must be at most 1.0"),
    ],
)
def test_a_wrong_budget_is_refused(text: str, problem: str) -> None:
    """The message names the key, its value, and what is valid."""
    found = problems(f"{BASE}budget: {text}\n")
    assert len(found) == 1
    assert found[0].startswith(problem)


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ("depth: {remove: 3}", "depth.remove cannot be set beside it; remove depth, or remove budget and keep depth."),
        (
            "depth: {layers: [3]}\nexperts: {keep: 2}",
            "depth.layers, experts.keep cannot be set beside it; remove depth",
        ),
        ("width: {mlp: 0.5, criterion: {kind: activation}}", "width.mlp, width.criterion cannot be set beside it"),
    ],
)
def test_sizes_beside_a_budget_are_refused(sections: str, keys: str) -> None:
    """A budget chooses the shape; the message says which section to remove."""
    found = problems(f"{BASE}budget: {{parameters: 0.9}}\n{sections}\n")
    assert found == [one for one in found if one.startswith(f"budget: chooses the shape, so {keys}")]


def test_a_recipe_with_a_budget_is_read_back_from_its_own_text() -> None:
    """The YAML of a recipe made in Python has the budget, its family and its axes."""
    recipe = Recipe.parse(f"{BASE}budget: {{parameters: [0.9, 0.7], axes: [mlp]}}\n").derived({})
    again = Recipe.parse(recipe.text)
    assert (again.budget, again.budget and again.budget.family) == (recipe.budget, "parameters")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{heads: 2, multiple: 64}", "width: multiple rounds the number of neurons; give mlp or neurons, or remove it"),
        ("{mlp: 0.5, heads_criterion: {kind: share}}", "width: heads_criterion scores heads; give heads, or remove it"),
    ],
)
def test_settings_of_units_that_stay_are_refused(text: str, problem: str) -> None:
    """A multiple needs neurons that are removed, and a criterion of heads needs heads that are."""
    assert problems(f"{BASE}width: {text}\n") == [problem]


def test_heads_and_neurons_may_be_scored_differently() -> None:
    """``heads_criterion`` scores heads; without it ``criterion`` scores both."""
    text = "width: {mlp: 0.5, heads: 1, criterion: {kind: activation}, heads_criterion: {kind: share}}"
    width = Recipe.parse(BASE + text).width
    assert width is not None
    assert (width.neuron_criterion.kind, width.head_criterion.kind) == ("activation", "share")


def test_a_family_has_no_single_repository() -> None:
    """Several models cannot be pushed to one repository; a single one can."""
    hub = "hub: {repo_id: org/small}\n"
    found = problems(f"{BASE}budget: {{parameters: [0.9, 0.8]}}\n{hub}")
    assert len(found) == 1
    assert found[0].startswith("hub")
    assert "push each" in found[0]
    assert Recipe.parse(f"{BASE}budget: {{parameters: 0.9}}\n{hub}").hub is not None
