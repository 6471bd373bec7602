"""Properties of the scores of every width criterion; a new criterion is tested by being defined."""

from __future__ import annotations

import pytest
import torch
from helpers.scored import recipe_of
from helpers.unit import NEURONS, WINDOWS, Unit

from llmprune.common.errors import RecipeError
from llmprune.criteria.base import WidthCriterion

KINDS = {kind.model_fields["kind"].default: kind for kind in WidthCriterion.kinds()}
BY_TEXT = [kind for kind in KINDS if kind != "magnitude"]

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_scores_are_finite_and_one_a_neuron(kind: str) -> None:
    """Float32 [F], none below zero, and not all the same."""
    scores_F = Unit().scores(KINDS[kind]())
    assert (scores_F.shape, scores_F.dtype) == ((NEURONS,), torch.float32)
    assert scores_F.isfinite().all()
    assert scores_F.min() >= 0
    assert scores_F.unique().numel() == NEURONS


@every_kind
def test_half_precision_is_summed_in_more(kind: str) -> None:
    """Weights and activations in bfloat16 give the scores of the same numbers in float32.

    The product with the output projection is an exception: it is rounded as in the layer.
    """
    half, full = Unit(), Unit()
    for unit, dtype in ((half, torch.bfloat16), (full, torch.float32)):
        unit.output_DF = unit.output_DF.bfloat16().to(dtype)
        unit.inputs = [rows.bfloat16().to(dtype) for rows in unit.inputs]
        unit.activation_BLF = unit.activation_BLF.bfloat16().to(dtype)
        unit.gradient_BLD = unit.gradient_BLD.bfloat16().to(dtype)
    if KINDS[kind]().needs_gradients:  # products with gradients are float32 in the backward pass
        half = full
    rounding = {"rtol": 2**-8, "atol": 0} if kind == "share" else {}
    torch.testing.assert_close(half.scores(KINDS[kind]()), full.scores(KINDS[kind]()), **rounding)


@every_kind
def test_scores_do_not_depend_on_the_batch_size(kind: str) -> None:
    """One window a batch and all windows in one batch give the same scores."""
    one, all_at_once = (Unit().scores(KINDS[kind](), batch) for batch in (1, WINDOWS))
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-6)


@every_kind
def test_sums_of_two_halves_are_those_of_the_whole(kind: str) -> None:
    """Two processes with half the windows each, after adding up their sums, have the scores of one process."""
    unit, criterion = Unit(), KINDS[kind]()
    first, second = (unit.accumulate(criterion, windows) for windows in (slice(0, 2), slice(2, None)))
    for own, other in zip(first.reducible_state(), second.reducible_state(), strict=True):
        own += other
    torch.testing.assert_close(first.scores(), unit.scores(criterion), rtol=1e-4, atol=1e-6)


@every_kind
def test_permuted_neurons_have_permuted_scores(kind: str) -> None:
    """The order of the neurons does not matter."""
    order_F = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))
    scores_F = Unit().scores(KINDS[kind]())
    torch.testing.assert_close(Unit().neurons(order_F).scores(KINDS[kind]()), scores_F[order_F], rtol=1e-4, atol=1e-6)


@every_kind
def test_a_neuron_without_weights_scores_lowest(kind: str) -> None:
    """A neuron with zero input and output weights is removed first."""
    unit = Unit()
    unit.output_DF[:, 3] = 0
    unit.activation_BLF[..., 3] = 0
    for rows in unit.inputs:
        rows[3] = 0
    assert int(unit.scores(KINDS[kind]()).argmin()) == 3


@pytest.mark.parametrize("kind", BY_TEXT)
@pytest.mark.parametrize("silent", [True, False])
def test_a_neuron_that_adds_nothing_scores_lowest(kind: str, silent: bool) -> None:
    """A neuron with zero activation or a zero output column is removed first, whatever its other weights are."""
    unit = Unit()
    if silent:
        unit.activation_BLF[..., 3] = 0
    else:
        unit.output_DF[:, 3] = 0
    scores_F = unit.scores(KINDS[kind]())
    assert int(scores_F.argmin()) == 3
    assert scores_F[3] <= 1e-6 * scores_F.max()


@every_kind
def test_a_kind_is_read_from_a_recipe(kind: str) -> None:
    """``width.criterion.kind`` picks the class."""
    recipe = recipe_of("llama", {"mlp": 0.5, "criterion": {"kind": kind}})
    assert recipe.width is not None
    assert type(recipe.width.criterion) is KINDS[kind]


def test_an_unknown_kind_names_the_nearest() -> None:
    """The error for a misspelt kind lists all kinds and names the nearest."""
    with pytest.raises(RecipeError, match=r"not 'tailor'; did you mean 'taylor'\?"):
        recipe_of("llama", {"mlp": 0.5, "criterion": {"kind": "tailor"}})
