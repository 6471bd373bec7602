"""Order in which a search removes layers, each judged together with all that went before.

Scores that layers got one by one do not add up: what a layer can do without depends on its neighbours. So after each
removal the model is judged anew without each of those that cost least alone (greedy removal; SLEB, arXiv 2402.09025,
tries all). Consecutive layers often cost less, and one refit of the layer before replaces them all:
arXiv 2403.17887 removes such a span, by the angle between hidden states. Here each is judged without its layers, and
the angle decides among those that cost about the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from llmprune.common.errors import NumericalError
from llmprune.score.layer_turns import Layers
from llmprune.score.removed_together import LayerCosts, best_together, known

MayKeep = Callable[[set[int]], bool]


def score_order(scores_N: Tensor, *, rounds: int, may_keep: MayKeep, size: int = 1) -> tuple[int, ...]:
    """Return layers in the order of their removal by their own scores, the lowest first; nothing is judged.

    ``rounds``: removals; ``size``: consecutive kept layers that each removes; ``may_keep``: True for layers that a
    model may consist of. Fewer are returned where no further layer may be removed.
    """
    scores: list[float] = scores_N.tolist()

    def lowest(_: list[int], groups: list[Layers]) -> Layers:
        return min(groups, key=lambda group: (sum(scores[layer] for layer in group), group))

    return _removals(lowest, layers=len(scores), rounds=rounds, size=size, may_keep=may_keep)


def removal_order(
    costs: LayerCosts, *, layers: int, rounds: int, tried: int, may_keep: MayKeep, size: int = 1
) -> tuple[int, ...]:
    """Return layers in the order of their removal, as ``score_order`` does, judged in every round.

    All are of one span, as long as all rounds remove, where that is better than layers chosen one by one
    (``best_together``).
    ``layers``: of the model; ``tried``: groups that are judged in each round after the first. Raises NumericalError
    where no cost of a round is finite.
    """
    alone = costs.without_each(range(layers), _groups([*range(layers)], size, may_keep=may_keep))

    def cheapest(kept: list[int], groups: list[Layers]) -> Layers:
        if len(kept) == layers:
            return _cheapest({group: alone[group] for group in groups})
        lowest = sorted(groups, key=lambda group: (known(alone.get(group)), group))[:tried]
        return _cheapest(costs.without_each(kept, sorted(lowest)))

    removals = partial(_removals, cheapest, layers=layers, rounds=rounds, size=size)
    order = removals(may_keep=may_keep)
    if len(order) <= size:
        return order
    span, _ = best_together(costs, tuple(sorted(order)), layers=layers, may_keep=may_keep)
    rest = set(range(layers)) - set(span)
    if rest.isdisjoint(order):
        return order
    other = removals(may_keep=lambda left: rest <= left and may_keep(left))
    return other if len(other) == len(order) else order


def _removals(
    choose: Callable[[list[int], list[Layers]], Layers], *, layers: int, rounds: int, size: int, may_keep: MayKeep
) -> tuple[int, ...]:
    """Return layers in the order of their removal; ``choose`` returns a group of those that may go from the kept."""
    kept, order = list(range(layers)), list[int]()
    for _ in range(rounds):
        groups = _groups(kept, size, may_keep=may_keep)
        if not groups:
            break
        order += choose(kept, groups)
        kept = [layer for layer in kept if layer not in order]
    return tuple(order)


def _cheapest(found: dict[Layers, float]) -> Layers:
    """Return the group of layers whose removal costs least; of equal ones the first."""
    finite = {group: cost for group, cost in found.items() if math.isfinite(cost)}
    if not finite:
        raise NumericalError(
            f"budget.axes.layers: without any of layers {', '.join(str(group[0]) for group in found)} the divergence "
            "of the model is not finite; try model.dtype: float32, or leave layers out of budget.axes"
        )
    return min(finite, key=lambda group: (finite[group], group))


def _groups(kept: list[int], size: int, *, may_keep: MayKeep) -> list[Layers]:
    """Return the consecutive kept layers, ``size`` of them, that may be removed together."""
    spans = [tuple(kept[start : start + size]) for start in range(len(kept) - size + 1)]
    return [span for span in spans if may_keep(set(kept) - set(span))]
