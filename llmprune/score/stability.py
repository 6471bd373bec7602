"""Stability of the pruning decision: overlap of the cuts chosen on two halves of the calibration windows.

    overlap = |removed by both cuts| / |removed by one cut|

of the layers, and in each layer of the neurons, the key-value groups of heads and the experts. Random cuts overlap by
the share that is removed.

Shapes: F neurons of a unit, K of them kept; for experts with neurons of their own [E, F] and [E, K].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.cut.decision import Cut
from llmprune.results.figures.stability import Overlap, StabilityFigures


def halves(windows: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the windows in each of two halves, int64: every other window."""
    numbers_N = torch.arange(windows)
    return numbers_N[::2], numbers_N[1::2]


def compare(
    choose: Callable[[Tensor], Cut],
    windows: int,
    *,
    anatomy: Anatomy,
    named: bool = False,
) -> StabilityFigures:
    """Return how far the cuts chosen on each half of the windows agree.

    ``choose``: from the numbers of windows to a cut. ``named``: the recipe names the layers, so that no half chooses
    them.
    """
    parts = halves(windows)
    one, other = (choose(half_N) for half_N in parts)
    chosen = one.removed and not named
    layers = [_shared(torch.tensor(one.layers), torch.tensor(other.layers), total=one.num_layers)] if chosen else []
    widths = {unit_key(index, unit.path): unit.width for index, units in enumerate(anatomy.units) for unit in units}
    experts = anatomy.experts.count if anatomy.experts else 0
    groups = anatomy.heads.count if anatomy.heads else 0
    return StabilityFigures(
        windows=(len(parts[0]), len(parts[1])),
        removed_layers=(one.removed, other.removed),
        layers=_summary(layers),
        neurons=_summary([_shared(keep, other.neurons[key], total=widths[key]) for key, keep in one.neurons.items()]),
        heads=_summary([_shared(keep, other.heads[key], total=groups) for key, keep in one.heads.items()]),
        experts=_summary([_shared(keep, other.experts[key], total=experts) for key, keep in one.experts.items()]),
    )


def _shared(one: Tensor, other: Tensor, *, total: int) -> tuple[float, float]:
    """Return the share of what one cut removes that the other removes too, and its expectation by chance.

    ``one`` and ``other``: indices of the kept units; ``total``: their number in the dense model.
    """
    every = torch.ones(*one.shape[:-1], total, dtype=torch.bool)
    removed, removed_by_other = (every.scatter(-1, keep, False) for keep in (one, other))
    return float((removed & removed_by_other).sum() / removed.sum()), float(removed.double().mean())


def _summary(shares: list[tuple[float, float]]) -> Overlap | None:
    """Return the mean and the least of the shares, and their expectation by chance; None where nothing is removed."""
    if not shares:
        return None
    found, chance = zip(*shares, strict=True)
    return Overlap(mean=sum(found) / len(found), least=min(found), by_chance=sum(chance) / len(chance))
