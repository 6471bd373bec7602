"""Optimal brain surgeon: greedy removal of neurons and of groups with compensation.

Shapes: T tokens, D hidden size, F neurons, K removed.

"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.devices import simulated_devices
from helpers.unit import HIDDEN, Unit, normal
from torch import Tensor

from llmprune.common.errors import NumericalError
from llmprune.criteria.accumulators.obs import group_order, removal_order
from llmprune.criteria.width.activation import Activation
from llmprune.criteria.width.obs import Obs


def _error_without(gram_FF: Tensor, weight_DF: Tensor, pull: float, removed: Sequence[int]) -> float:
    """Error of the output without these neurons, after the weights of the others are solved again."""
    kept = [neuron for neuron in range(len(gram_FF)) if neuron not in removed]
    lost_DK = weight_DF[:, list(removed)]
    moment_FD = gram_FF[kept][:, list(removed)] @ lost_DK.T
    solved_FD = torch.linalg.solve(gram_FF[kept][:, kept] + pull * torch.eye(len(kept)).double(), moment_FD)
    energy = (lost_DK @ gram_FF[list(removed)][:, list(removed)] * lost_DK).sum()
    return float(energy - (solved_FD * moment_FD).sum())


@pytest.mark.parametrize(
    ("size", "order"),
    [
        *((1, partial(removal_order, together=together)) for together in (1, 3, 64)),
        (3, partial(group_order, size=3)),
    ],
    ids=["one by one", "in threes", "at once", "groups"],
)
def test_obs_is_greedy_removal_with_everything_solved_again(size: int, order: Callable[..., Any]) -> None:
    """Order and errors equal those of removing every neuron, or every group of three, in turn and solving all others.

    They do not depend on the size of the blocks.
    """
    width, ridge = 12, 0.3
    input_TF = normal(40, width, seed=1).double() @ normal(width, width, seed=2).double()
    weight_DF, gram_FF = normal(HIDDEN, width, seed=3).double(), input_TF.T @ input_TF
    pull = ridge * float(gram_FF.diagonal().mean())
    removed: list[int] = []
    errors = []
    while len(removed) < width // size:
        costs = {
            group: _error_without(
                gram_FF, weight_DF, pull, [size * each + place for each in [*removed, group] for place in range(size)]
            )
            for group in range(width // size)
            if group not in removed
        }
        removed.append(min(costs, key=costs.__getitem__))
        errors.append(costs[removed[-1]])
    found, found_errors = order(gram_FF.clone(), weight_DF, ridge=ridge)
    assert found.tolist() == removed
    torch.testing.assert_close(found_errors, torch.tensor(errors, dtype=torch.float64))


def test_a_group_of_one_input_is_a_neuron() -> None:
    """Removal by groups of one input gives the scores of removal by neurons."""
    unit = Unit()
    grouped_F = unit.accumulate(Obs(), slice(None)).group_scores(1)
    torch.testing.assert_close(grouped_F, unit.scores(Obs()), rtol=1e-4, atol=1e-6)


def test_one_loud_input_among_silent_ones_is_worth_less_than_many() -> None:
    """Of two uncorrelated groups the one with less output energy is removed first, whatever the order of its inputs."""
    values_TF = torch.zeros(16, 16)
    values_TF[range(16), range(16)] = torch.tensor([3.2] + [0.01] * 7 + [1.0] * 8) * 4
    sums = Obs(ridge=1e-3).make_accumulator(torch.eye(16))
    sums.update(values_TF)
    loud, many = sums.group_scores(8).tolist()
    assert many < loud


def test_obs_scores_end_with_all_that_is_written() -> None:
    """The highest score is the mean energy of the whole output: the error after the last removal."""
    unit = Unit()
    output_TD = unit.activation_BLF.flatten(0, 1) @ unit.output_DF.T
    torch.testing.assert_close(unit.scores(Obs()).max(), output_TD.square().sum(1).mean(), rtol=1e-4, atol=0)


def test_obs_counts_equal_neurons_once() -> None:
    """Of two equal neurons one is cheap to remove; by their activations alone both are important."""
    unit = Unit()
    unit.activation_BLF[..., 3] = unit.activation_BLF[..., 5] = 10 * unit.activation_BLF[..., 5]
    assert int(unit.scores(Obs(ridge=1e-4)).argmin()) in (3, 5)
    assert int(unit.scores(Activation()).argmin()) not in (3, 5)


def test_obs_without_correlations_is_the_activation_criterion() -> None:
    """With shrinkage 1, scores are the cumulative energies of single neurons in rising order."""
    unit = Unit()
    energy_F, order_F = unit.scores(Activation()).sort()
    torch.testing.assert_close(unit.scores(Obs(shrinkage=1.0))[order_F], energy_F.cumsum(0), rtol=1e-4, atol=1e-5)


def test_obs_refuses_a_gram_matrix_that_is_not_finite() -> None:
    """NaN in the Gram matrix raises an error with the settings to change."""
    with pytest.raises(NumericalError, match=r"raise width\.criterion\.ridge or calibration\.samples"):
        removal_order(torch.full((3, 3), torch.nan).double(), torch.ones(2, 3).double(), ridge=1.0)


@pytest.mark.parametrize("order", [removal_order, partial(group_order, size=1)], ids=["neurons", "groups"])
def test_obs_chooses_nothing_by_costs_that_are_not_finite(order: Callable[..., Any]) -> None:
    """Infinite sums or weights raise the same error instead of giving an order."""
    for value in (torch.inf, 1e300):
        gram_FF, weight_DF = torch.eye(3).double(), torch.ones(2, 3).double()
        gram_FF[1, 1], weight_DF[0, 2] = value, 1e200
        with pytest.raises(NumericalError, match=r"obs finds no order"):
            order(gram_FF, weight_DF, ridge=1.0)


def test_removal_errors_rise() -> None:
    """The error after a removal is at least that before it."""
    scores = Unit().scores(Obs()).sort().values.tolist()
    assert all(before <= after for before, after in pairwise(scores))


def _scores_on_a_device(width: int) -> tuple[Tensor, Tensor]:
    """Scores of the neurons of a unit on the current device, and of its groups of four."""
    found = []
    for score in (lambda sums: sums.scores(), lambda sums: sums.group_scores(4)):
        sums = Obs(shrinkage=0.1).make_accumulator(normal(HIDDEN, width, seed=1).to("cuda"))
        sums.update(normal(2, 3 * width, width, seed=2).to("cuda"))
        found.append(score(sums).cpu())
    return found[0], found[1]


def test_removals_do_not_wait_for_the_device() -> None:
    """The order of any number of neurons takes the same number of waits."""
    seen = []
    for width in (16, 200):
        with simulated_devices(1) as devices:
            _scores_on_a_device(width)
        assert devices.float64
        seen.append(devices.waits)
    assert seen[0] == seen[1]


def test_float64_matrices_avoid_devices_that_are_slow_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a gaming GPU the order is found on the CPU in float64, and is the same."""
    with simulated_devices(1):
        expected = _scores_on_a_device(40)
    with simulated_devices(1) as devices:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
        found = _scores_on_a_device(40)
    assert not devices.float64
    assert all(map(torch.equal, found, expected))
