"""Agreement of sources of text: how much of what a cut keeps each of them alone would keep too.

Shapes: F neurons of a unit, K of them kept; for experts with neurons of their own [E, F] and [E, K].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.cut.decision import Cut
from llmprune.results.figures.stability import SourceFigures
from llmprune.score.scores import Scores

Shares = tuple[float | None, ...]


def compare_sources(
    by_source: Sequence[Scores], cut: Cut, *, choose: Callable[[Scores], Cut], layers_N: Tensor | None
) -> SourceFigures:
    """Return how far the cuts that sources would choose alone agree with a cut; sources get no names.

    ``choose``: from scores to a cut. ``layers_N``: scores of the layers for sources that have none of their own.
    """
    alone = [choose(one if one.layers is not None else replace(one, layers=layers_N)) for one in by_source]
    own_layers = all(one.layers is not None for one in by_source)
    return SourceFigures(
        names=(),
        windows=(),
        removed_layers=tuple(one.removed for one in alone) if own_layers and cut.removed else (),
        neurons=_shares(cut, [one.neurons for one in alone], kept=cut.neurons),
        heads=_shares(cut, [one.heads for one in alone], kept=cut.heads),
        experts=_shares(cut, [one.experts for one in alone], kept=cut.experts),
    )


def _shares(cut: Cut, alone: Sequence[Mapping[str, Tensor]], *, kept: Mapping[str, Tensor]) -> Shares:
    """Return for each dense layer the share of the kept units that every source keeps; None where none is cut."""
    if not kept:
        return ()
    shared, total = [0] * cut.num_layers, [0] * cut.num_layers
    for key, keep in kept.items():
        layer = int(key.partition(".")[0])
        shared[layer] += _kept_by_all([keep, *(one[key] for one in alone)])
        total[layer] += keep.numel()
    return tuple(
        shared[layer] / total[layer] if total[layer] and layer in cut.layers else None
        for layer in range(cut.num_layers)
    )


def _kept_by_all(keeps: Sequence[Tensor]) -> int:
    """Count the units that are in all of several selections of kept ones."""
    width = 1 + max(int(keep.max()) for keep in keeps)
    in_all = torch.ones(*keeps[0].shape[:-1], width, dtype=torch.bool)
    for keep in keeps:
        in_all &= torch.zeros_like(in_all).scatter(-1, keep, True)
    return int(in_all.sum())
