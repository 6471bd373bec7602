"""Layers that are removed together: those that scores choose, or a span of as many consecutive ones.

Which layers can go together is seen only without all of them: what one can do without depends on its neighbours.

Shapes: N layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmprune.score.layer_turns import Layers

_NEAR = 1.5  # times the lowest cost: layers that cost no more may go for what a repair has less to make up for


class LayerCosts(Protocol):
    """Costs of removing layers from a model."""

    def without_each(self, kept: Sequence[int], candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return the cost of the model of the ``kept`` layers without each of the candidates in turn.

        A candidate is one or more of these layers, ascending, that are left out together.
        """

    def turns(self, candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return by how much each candidate turns what the dense model's head reads (``turns_of``)."""

    def remove(self, layer: int) -> None:
        """Remove a layer for good."""


def with_best_span(
    scores_N: Tensor, costs: LayerCosts, *, kept: Collection[int], may_keep: Callable[[set[int]], bool]
) -> Tensor:
    """Return the scores [N], or such that the lowest are those of consecutive layers where these are better removed.

    ``kept``: layers that the scores keep. All spans of as many layers as the others are judged beside these, each
    removed together.
    """
    lowest = tuple(layer for layer in range(len(scores_N)) if layer not in kept)
    best, cost = best_together(costs, lowest, layers=len(scores_N), may_keep=may_keep)
    if best == lowest:
        return scores_N
    is_best_N = torch.zeros(len(scores_N), dtype=torch.bool).index_fill_(0, torch.tensor(best), True)
    return torch.where(is_best_N, scores_N.clamp(max=cost), scores_N.clamp(min=above(cost)))


def best_together(
    costs: LayerCosts, chosen: Layers, *, layers: int, may_keep: Callable[[set[int]], bool]
) -> tuple[Layers, float]:
    """Return the best of the ``chosen`` layers and all spans of as many, of a model's ``layers``; and its cost.

    Of those that cost little more than the cheapest, it is the one that turns what the head reads least: a repair makes
    up for it best. What a span leaves of the model must pass ``may_keep``. Where no cost is finite, the chosen layers
    are returned.
    """
    kept = range(layers)
    spans = [tuple(kept[start : start + len(chosen)]) for start in range(layers - len(chosen) + 1)]
    allowed = [span for span in spans if may_keep(set(kept) - set(span))]
    found = costs.without_each(kept, list(dict.fromkeys([chosen, *allowed])))
    lowest = min(map(known, found.values()))
    near = [one for one, cost in found.items() if known(cost) <= max(lowest, _NEAR * lowest)]
    turns = costs.turns(near) if math.isfinite(lowest) else {}
    best = min(near, key=lambda one: (turns.get(one, 0.0), one != chosen))
    return best, found[best]


def known(cost: float | None) -> float:
    """Return a cost; infinity where it is unknown or not finite."""
    return math.inf if cost is None or not math.isfinite(cost) else cost


def above(score: float) -> float:
    """Return the next float32 above a score."""
    return float(torch.tensor(score).nextafter(torch.tensor(math.inf)))
