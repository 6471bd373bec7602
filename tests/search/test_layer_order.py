"""Order in which a search removes layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import pytest
import torch

from llmprune.common.errors import NumericalError
from llmprune.search.layer_order import removal_order, score_order


class Costs:
    """Costs of layers that depend on what is removed already; records the layers that were judged."""

    def __init__(self, alone: list[float], *, together: dict[tuple[int, int], float]) -> None:
        self.alone, self.together = alone, together
        self.removed: list[int] = []
        self.judged: list[list[int]] = []

    def without_each(self, kept: Sequence[int], candidates: Collection[int], *, size: int = 1) -> dict[int, float]:
        """Return the cost of each candidate alone, and of each pair with a removed layer."""
        self.judged.append(list(candidates))
        return {
            layer: self.alone[layer] + sum(self.together.get((gone, layer), 0.0) for gone in self.removed)
            for layer in candidates
        }

    def remove(self, layer: int) -> None:
        """Remove a layer."""
        self.removed.append(layer)


def test_neighbours_are_judged_together() -> None:
    """Layer 2 is the second cheapest alone, but not once layer 1 is gone."""
    costs = Costs([5, 1, 2, 3, 9], together={(1, 2): 10.0})
    assert removal_order(costs, torch.zeros(5), rounds=2, tried=4, may_keep=lambda _: True) == (1, 3)


def test_a_quick_order_is_that_of_the_scores() -> None:
    """The lowest score goes first, of layers that may go; fewer are removed where no other may."""
    scores = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert score_order(scores, rounds=2, may_keep=lambda _: True) == (3, 1)
    assert score_order(scores, rounds=4, may_keep=lambda kept: 3 in kept and len(kept) > 1) == (1, 2)


def test_groups_of_layers_are_removed_together() -> None:
    """A group is as cheap as its judgement says, and its scores add up where none is made."""
    scores_N = torch.tensor([1.0, 9.0, 2.0, 3.0, 2.0, 5.0])
    in_place = {(0, 3, 4, 5), (0, 1, 2, 5), (0, 5)}

    def may_keep(left: set[int]) -> bool:
        return tuple(sorted(left)) in in_place

    assert score_order(scores_N, rounds=3, may_keep=may_keep, size=2) == (3, 4, 1, 2)
    costs = Costs([0, 1, 0, 7, 0, 0], together={})
    assert removal_order(costs, scores_N, rounds=2, tried=2, may_keep=may_keep, size=2) == (1, 2, 3, 4)
    assert costs.judged == [[1, 3], [3]]


def test_only_the_cheapest_are_judged_again() -> None:
    """In every round as many layers as asked for are judged, those with the lowest scores of their own."""
    costs = Costs([1, 5, 2, 3, 9], together={})
    scores_N = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0])
    assert removal_order(costs, scores_N, rounds=3, tried=2, may_keep=lambda _: True) == (2, 3, 1)
    assert costs.judged == [[1, 2], [1, 3], [1, 4]]


def test_layers_that_must_stay_are_not_judged() -> None:
    """A model that may not consist of the rest is not tried, and the order ends where nothing may go."""
    costs = Costs([1, 2, 3], together={})
    assert removal_order(
        costs, torch.zeros(3), rounds=3, tried=3, may_keep=lambda kept: 0 in kept and len(kept) > 1
    ) == (1,)
    assert costs.judged[0] == [1, 2]


def test_no_finite_cost_is_an_error() -> None:
    """Layers whose removal cannot be judged are not removed, and a shape does not keep them in silence either."""
    with pytest.raises(NumericalError, match=r"layers 0, 1, 2 .* is not finite"):
        removal_order(Costs([math.nan] * 3, together={}), torch.zeros(3), rounds=1, tried=3, may_keep=lambda _: True)
    second = Costs([1, 2, 3], together={(0, 1): math.nan, (0, 2): math.inf})
    with pytest.raises(NumericalError, match=r"layers 1, 2 .* is not finite"):
        removal_order(second, torch.zeros(3), rounds=2, tried=3, may_keep=lambda _: True)
