"""Choice among shapes by their divergences from the dense model on several sources of text.

    score = (geometric mean of the divergences over the sources) · (layers of the dense model / layers kept)

The geometric mean gives every source the same say, whatever its scale. The second factor is a handicap of missing
layers, which cost more on text unlike the calibration than its own windows show: against narrower MLPs of the same
size, SmolLM2-135M without 2 and 4 of its 30 layers diverged 4 and 7 % less on C4, and 8 and 6 % more on average over
seven texts unlike the calibration, with layers ordered on repeated windows alone. After a training too, narrower models
retain more than shallower ones of their size (arXiv 2408.11796).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

Divergences = tuple[float, ...]  # KL(dense ‖ shape) in nats per token, by source

_LEAST = 1e-9  # nats per token; less counts as this
_BROKEN = 3.0  # multiple of the typical divergence on a source, over the multiple on the other sources


def ranked(tried: Sequence[Divergences], kept: Sequence[float]) -> list[int]:
    """Return the numbers of the shapes, the best first: by their scores, those that a source finds broken last.

    ``kept``: the share of its layers that each keeps.
    """
    faults = broken_sources(tried)
    scores = [score(one, share) for one, share in zip(tried, kept, strict=True)]
    return sorted(range(len(tried)), key=lambda number: (faults[number] is not None, scores[number], number))


def score(tried: Divergences, kept: float) -> float:
    """Return the score of a shape, in nats per token; infinite where a divergence is not finite.

    ``kept``: the share of the layers that it keeps.
    """
    if not all(map(math.isfinite, tried)):
        return math.inf
    return math.exp(fmean(math.log(max(value, _LEAST)) for value in tried)) / kept


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
