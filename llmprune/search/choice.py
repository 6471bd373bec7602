"""Choice among shapes by their divergences from the dense model on several sources of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

Divergences = tuple[float, ...]  # KL(dense ‖ shape) in nats per token, by source

_BROKEN = 3.0  # multiple of the typical divergence on a source, over the multiple on the other sources


def ranked(tried: Sequence[Divergences]) -> list[int]:
    """Return the numbers of the shapes, the best first: by mean divergence, those that a source finds broken last."""
    faults = broken_sources(tried)
    return sorted(range(len(tried)), key=lambda number: (faults[number] is not None, _mean(tried[number]), number))


def broken_sources(tried: Sequence[Divergences]) -> list[int | None]:
    """Return for each shape the source on which it is broken, whatever its mean says; None for most.

    Its divergence there, as a multiple of the median shape's, is more than three times the median of these multiples
    over its other sources, and more than three; or it is not finite.
    """
    medians = [median(values) for values in zip(*tried, strict=True)]
    return [_broken(one, medians) for one in tried]


def _broken(tried: Divergences, medians: Sequence[float]) -> int | None:
    infinite = [source for source, value in enumerate(tried) if not math.isfinite(value)]
    if infinite:
        return infinite[0]
    multiples = [value / typical if typical > 0 else 1.0 for value, typical in zip(tried, medians, strict=True)]
    worst = max(range(len(multiples)), key=multiples.__getitem__)
    others = [value for source, value in enumerate(multiples) if source != worst]
    return worst if others and multiples[worst] > _BROKEN * max(median(others), 1.0) else None


def _mean(tried: Divergences) -> float:
    return fmean(value if math.isfinite(value) else math.inf for value in tried)
