"""Order in which a search removes layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import combinations

import pytest
import torch

from llmprune.common.errors import NumericalError
from llmprune.score.layer_turns import Layers
from llmprune.search.layer_order import MayKeep, removal_order, score_order


class Costs:
    """Costs of layers that depend on what is removed already; records the layers that were judged."""

    def __init__(self, alone: list[float], *, together: dict[tuple[int, int], float]) -> None:
        self.alone, self.together = alone, together
        self.judged: list[list[Layers]] = []

    def without_each(self, kept: Sequence[int], candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return the costs of all layers that are gone with a candidate, and of all pairs of them."""
        self.judged.append(list(candidates))
        gone = set(range(len(self.alone))) - set(kept)
        return {candidate: self._cost(gone | set(candidate)) for candidate in candidates}

    def turns(self, candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return the costs: what costs least turns least."""
        return {candidate: self._cost(set(candidate)) for candidate in candidates}

    def remove(self, layer: int) -> None:
        """Remove a layer."""

    def _cost(self, removed: set[int]) -> float:
        pairs = (self.together.get(pair, 0.0) for pair in combinations(sorted(removed), 2))
        return sum(self.alone[layer] for layer in removed) + sum(pairs)


def order_of(costs: Costs, *, rounds: int, tried: int = 9, may_keep: MayKeep = lambda _: True) -> tuple[int, ...]:
    """Order in which layers of these costs are removed."""
    return removal_order(costs, layers=len(costs.alone), rounds=rounds, tried=tried, may_keep=may_keep)


def test_neighbours_are_judged_together() -> None:
    """Layer 2 is the second cheapest alone, but not once layer 1 is gone."""
    costs = Costs([5, 1, 2, 3, 9], together={(1, 2): 10.0})
    assert order_of(costs, rounds=2) == (1, 3)


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
    assert removal_order(costs, layers=6, rounds=2, tried=2, may_keep=may_keep, size=2) == (1, 2, 3, 4)
    assert costs.judged == [[(1, 2), (3, 4)], [(3, 4)], [(1, 2, 3, 4)]]


def test_only_the_cheapest_are_judged_again() -> None:
    """After the first round as many layers as asked for are judged, those that cost least alone."""
    costs = Costs([9, 1, 2, 3, 9, 4], together={(1, 2): 9.0, (1, 3): 0.5})
    assert order_of(costs, rounds=3, tried=2) == (1, 3, 5)
    assert costs.judged[:3] == [[(layer,) for layer in range(6)], [(2,), (3,)], [(2,), (5,)]]


def test_layers_of_a_span_go_where_they_cost_less_together() -> None:
    """As many as all rounds remove are judged together, beside those chosen one by one; then they are ordered."""
    costs = Costs([9, 1, 4, 1.3, 1.2, 9], together={(1, 3): 5.0, (1, 4): 5.0})
    assert order_of(costs, rounds=2) == (4, 3)
    assert costs.judged[2] == [(1, 2), (0, 1), (2, 3), (3, 4), (4, 5)]
    assert order_of(costs, rounds=1) == (1,)


def test_layers_of_a_span_that_may_not_go_are_not_judged() -> None:
    """The check of what is left holds for them too."""
    costs = Costs([9, 1, 4, 1.3, 1.2, 9], together={(1, 3): 5.0, (1, 4): 5.0})
    assert order_of(costs, rounds=2, may_keep=lambda left: bool({3, 4} & left)) == (1, 2)
    assert (3, 4) not in costs.judged[2]


def test_layers_that_must_stay_are_not_judged() -> None:
    """A model that may not consist of the rest is not tried, and the order ends where nothing may go."""
    costs = Costs([1, 2, 3], together={})
    assert order_of(costs, rounds=3, may_keep=lambda kept: 0 in kept and len(kept) > 1) == (1,)
    assert costs.judged[0] == [(1,), (2,)]
    assert order_of(costs, rounds=1, may_keep=lambda _: False) == ()


def test_no_finite_cost_is_an_error() -> None:
    """Layers whose removal cannot be judged are not removed, and a shape does not keep them in silence either."""
    with pytest.raises(NumericalError, match=r"layers 0, 1, 2 .* is not finite"):
        order_of(Costs([math.nan] * 3, together={}), rounds=1)
    second = Costs([1, 2, 3], together={(0, 1): math.nan, (0, 2): math.inf, (1, 2): math.nan})
    with pytest.raises(NumericalError, match=r"layers 1, 2 .* is not finite"):
        order_of(second, rounds=2)
