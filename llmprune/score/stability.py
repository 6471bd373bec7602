"""Whether a cut hangs on the calibration text: the halves of it choose, and their choices are compared.

    overlap = |what goes by both| / |what goes by one|

of the layers, and in each layer of the neurons, the key-value groups of heads and the experts.
Choices by chance overlap by the share that goes.

Shapes: F neurons of a unit, K of them kept; for experts with neurons of their own [E, F] and [E, K].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.cut.decision import Cut
from llmprune.results.schema import Overlap, StabilityFigures


def halves(windows_NL: Tensor, sources_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every other window of each source, from one to the next, so that each half has its share of every source."""
    if sources_N is not None:
        windows_NL = windows_NL[sources_N.argsort(stable=True)]
    return windows_NL[::2], windows_NL[1::2]


def compare(
    choose: Callable[[Tensor], Cut],
    windows_NL: Tensor,
    *,
    anatomy: Anatomy,
    named: bool = False,
    sources_N: Tensor | None = None,
) -> StabilityFigures:
    """What the halves of the windows choose, by a function from windows to a cut; the layers may be ``named``."""
    parts = halves(windows_NL, sources_N)
    one, other = (choose(half_NL) for half_NL in parts)
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
    """Of what goes by the one, the share that goes by the other too, and what that would be by chance."""
    stays = torch.ones(*one.shape[:-1], total, dtype=torch.bool)
    gone, gone_too = (stays.scatter(-1, keep, False) for keep in (one, other))
    return float((gone & gone_too).sum() / gone.sum()), float(gone.double().mean())


def _summary(shares: list[tuple[float, float]]) -> Overlap | None:
    if not shares:
        return None
    found, chance = zip(*shares, strict=True)
    return Overlap(mean=sum(found) / len(found), least=min(found), by_chance=sum(chance) / len(chance))
