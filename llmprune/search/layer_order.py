"""Order in which a search removes layers: one after the other, each judged together with all that went before.

Scores that layers got one by one do not add up: what a layer can do without depends on its neighbours. So after each
removal the model is judged anew without each of the remaining candidates (greedy removal, as SLEB, arXiv 2402.09025).
Only the ``tried`` layers that cost least so far are judged again, because a cost seldom falls when more is removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmprune.common.errors import NumericalError
from llmprune.score.ablation import LayerCosts


def removal_order(
    costs: LayerCosts, layers: int, *, rounds: int, tried: int, may_keep: Callable[[set[int]], bool]
) -> tuple[int, ...]:
    """Return the first ``rounds`` layers to remove, in their order.

    ``tried``: layers that are judged in each round after the first. ``may_keep``: True for layers that a model may
    consist of. Fewer are returned where no further layer may be removed. Raises NumericalError where no cost of a round
    is finite.
    """
    kept = list(range(layers))
    order: list[int] = []
    known: dict[int, float] = {}
    for done in range(rounds):
        allowed = [layer for layer in kept if may_keep(set(kept) - {layer})]
        if done:
            allowed = sorted(allowed, key=lambda layer: (known.get(layer, math.inf), layer))[:tried]
        if not allowed:
            break
        found = costs.without_each(kept, sorted(allowed))
        finite = {layer: cost for layer, cost in found.items() if math.isfinite(cost)}
        known |= {layer: finite.get(layer, math.inf) for layer in found}
        if not finite:
            raise NumericalError(
                f"budget.axes.layers: without any of layers {', '.join(map(str, found))} the divergence of the "
                "model is not finite; try model.dtype: float32, or leave layers out of budget.axes"
            )
        cheapest = min(finite, key=lambda layer: (finite[layer], layer))
        order.append(cheapest)
        kept.remove(cheapest)
        costs.remove(cheapest)
    return tuple(order)
