"""Schedule of a search: how many shapes each round tries, on how much text, and what that costs.

Successive halving (Jamieson & Talwalkar, arXiv 1502.07943) of the shapes, with ever more work on each: all are tried
without repair, a few with a repair that is solved on some of the calibration windows, and the last ones with one that
is solved on twice as many. All rounds judge on the same windows, so that a shape's rounds can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from llmprune.criteria.ablation import spans_passes
from llmprune.recipe.refit import Refit

_JUDGED_PART, _LEAST_OF_SOURCE, _MOST_OF_SOURCE = 8, 3, 8  # windows of a source that judge: every eighth
_JUDGED_TOKENS = 256  # of each of them, from its beginning; the second half of these counts
_REPAIR_TOKENS = 4096  # that a repair of the second round is solved on, at least
_REPAIR_PART, _MOST_TO_REPAIR = 10, 4  # one in ten calibration windows, where these are more; at most a quarter
_REPAIRED, _LAST = 4, 2  # shapes of the second and of the last round, for each budget
_ORDER_PART, _LEAST_TO_ORDER, _MOST_TO_ORDER = 8, 3, 6  # windows that the order of the layers is found on
ORDER_TOKENS = 256  # of each of them; the second half of these counts
REPEATED_TO_ORDER = 3  # every third of them is there once more, repeated
TRIED_LAYERS = 3  # that are judged in each round of that order but the first
_PASSES_OF_REPAIR = 4.0  # that a repair takes over its own windows, its solves included
_PASSES_OF_UP_REFIT = 5.0  # that it takes more with ``refit.up``


@dataclass(frozen=True)
class Schedule:
    """Rounds of a search on calibration windows of ``length`` tokens, with one of them at least for each process.

    ``windows``: all of them; ``judged``: those that shapes are judged on, and ``repeated`` of them once more with the
    first half twice, one of each source; ``repair``: those that the repairs of the second round are solved on, and
    twice as many in the last round. ``quick``: no shape is repaired, and the scores alone order the
    layers.
    """

    windows: int
    length: int
    judged: int
    repeated: int
    repair: int
    processes: int = 1
    quick: bool = False

    @classmethod
    def of(cls, by_source: Sequence[int], length: int, *, processes: int = 1, quick: bool = False) -> Schedule:
        """Return the schedule for calibration windows. ``by_source``: number of windows of each source."""
        windows, least = sum(by_source), least_judged(len(by_source), processes=processes)
        judging = [judged_of_source(number, least=least) for number in by_source]
        judged, repeated = sum(judging), sum(number > 0 for number in judging)
        wanted = max(min(ceil(_REPAIR_TOKENS / length), windows // _MOST_TO_REPAIR), windows // _REPAIR_PART, processes)
        return cls(windows, length, judged, repeated, max(min(wanted, windows - judged), 1), processes, quick)

    @property
    def judged_tokens(self) -> int:
        """Tokens of a judged window that pass through a model."""
        return min(self.length, _JUDGED_TOKENS)

    @property
    def rounds(self) -> tuple[int, int]:
        """Shapes that the second and the last round try for each budget."""
        return _REPAIRED, _LAST

    def repair_of(self, refit: Refit | None) -> Refit | None:
        """Return the repair of the shapes that are tried, in a recipe with this ``refit``; None: they stay as cut."""
        return None if self.quick else refit

    @property
    def repairs(self) -> tuple[int, int]:
        """Windows that the repairs of the second and of the last round are solved on."""
        return self.repair, min(2 * self.repair, self.windows - self.judged)

    @property
    def ordering(self) -> int:
        """Windows that the order of the layers is found on, of those that judge no shape."""
        wanted = max(min(max(self.windows // _ORDER_PART, _LEAST_TO_ORDER), _MOST_TO_ORDER), self.processes)
        return max(min(wanted, self.windows - self.judged), 1)

    def order_passes(self, layers: int, *, removed: int) -> float:
        """Return the most that the order costs in which as many of a model's layers or groups go, in the same unit.

        Each is judged alone, then some in each round, then all spans, and some of the best span in each round. A model
        without a layer shares what comes before that layer, on average half of the passes.
        """
        if self.quick:
            return 0.0
        windows = self.ordering + ceil(self.ordering / REPEATED_TO_ORDER)
        part = windows * min(ORDER_TOKENS, self.length) / (self.windows * self.length)
        alone, rounds = 1 + layers / 2, (removed - 1) * (1 + min(TRIED_LAYERS, layers) / 2)
        return part * (alone + (2 * rounds + spans_passes(layers, remove=removed) if removed > 1 else 0))

    def forward_passes(self, tried: Sequence[int], *, further: int, refit: Refit | None) -> float:
        """Return the cost in plain forward passes of the dense model over all calibration tokens.

        ``tried``: shapes of each budget; ``further``: shapes that go one step beyond a chosen one. ``refit``: None
        where nothing is repaired, so that the first round decides.
        """
        judged = (self.judged + self.repeated) * self.judged_tokens / (self.windows * self.length)
        if refit is None:
            return judged * (1 + sum(tried) + further)
        second = sum(min(number, _REPAIRED) for number in tried)
        last = sum(min(number, _LAST) for number in tried)
        each = _PASSES_OF_REPAIR + (_PASSES_OF_UP_REFIT if refit.up else 0)
        repaired = each * (self.repairs[0] * (second + further) + self.repairs[1] * last) / self.windows
        return judged * (1 + sum(tried) + second + further + last) + repaired


def least_judged(sources: int, *, processes: int) -> int:
    """Return how many windows of each source judge shapes at least: three, or more where processes would have none."""
    return max(_LEAST_OF_SOURCE, ceil(processes / sources))


def judged_of_source(windows: int, *, least: int) -> int:
    """Return how many of a source's windows judge shapes: every eighth, at least ``least``, at most half of them."""
    return min(max(min(windows // _JUDGED_PART, _MOST_OF_SOURCE), least), windows // 2)
