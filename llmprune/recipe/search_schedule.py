"""Schedule of a search: how many shapes each round tries, on how much text, and what that costs.

Successive halving (Jamieson & Talwalkar, arXiv 1502.07943) over shapes and text: all shapes are tried without repair on
a little text, a few with a repair that is solved on some of the calibration windows, and the last ones with one that is
solved on twice as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

_JUDGED_PART, _LEAST_OF_SOURCE, _MOST_OF_SOURCE = 8, 2, 8  # windows of a source that judge: every eighth
_JUDGED_TOKENS = 256  # of each of them, from its beginning
_REPAIR_TOKENS = 4096  # that a repair of the second round is solved on, at least
_REPAIR_PART = 10  # one in so many calibration windows, where these are more tokens
_REPAIRED, _LAST = 6, 2  # shapes of the second and of the last round, for each budget
ORDER_WINDOWS, ORDER_TOKENS = 8, 128  # that layers are ordered on, and the tokens of each from its beginning
TRIED_AGAIN = 8  # layers that are judged in each round of the order after the first
_PASSES_OF_REPAIR = 4.0  # that a repair takes over its own windows, its solves included


@dataclass(frozen=True)
class Schedule:
    """Rounds of a search on calibration windows of ``length`` tokens, at least one of them for each process.

    ``windows``: all of them; ``judged``: those that shapes are judged on, and ``repeated`` of them once more with the
    first half twice, one of each source; ``repair``: those that the repairs of the second round are solved on, and
    twice as many in the last round.
    """

    windows: int
    length: int
    judged: int
    repeated: int
    repair: int

    @classmethod
    def of(cls, by_source: Sequence[int], length: int, *, processes: int = 1) -> Schedule:
        """Return the schedule for calibration windows. ``by_source``: number of windows of each source."""
        windows, least = sum(by_source), least_judged(len(by_source), processes=processes)
        by_judging = [judged_of_source(number, least=least) for number in by_source]
        judged, repeated = sum(by_judging), sum(number > 0 for number in by_judging)
        wanted = max(ceil(_REPAIR_TOKENS / length), windows // _REPAIR_PART, processes)
        return cls(windows, length, judged, repeated, max(min(wanted, windows - judged), 1))

    @property
    def judged_tokens(self) -> int:
        """Tokens of a judged window that count."""
        return min(self.length, _JUDGED_TOKENS)

    @property
    def rounds(self) -> tuple[int, int]:
        """Shapes that the second and the last round try for each budget."""
        return _REPAIRED, _LAST

    @property
    def repairs(self) -> tuple[int, int]:
        """Windows that the repairs of the second and of the last round are solved on."""
        return self.repair, min(2 * self.repair, self.windows - self.judged)

    def passes_of_order(self, layers: int, *, removed: int) -> float:
        """Return the cost of the order in which ``removed`` of the layers go, in the unit of ``forward_passes``.

        A model without one layer is run from there on, half of the layers on average.
        """
        tokens = min(ORDER_WINDOWS, self.windows - self.judged) * min(ORDER_TOKENS, self.length)
        rounds = (
            (1 + (min(TRIED_AGAIN, layers - done) if done else layers) / 2) * (layers - done) / layers
            for done in range(removed)
        )
        return sum(rounds) * tokens / (self.windows * self.length)

    def forward_passes(self, tried: Sequence[int], *, further: int) -> float:
        """Return the cost of all rounds in plain forward passes of the dense model over all calibration tokens.

        ``tried``: shapes of each budget; ``further``: shapes that go one step beyond a chosen one.
        """
        judged = (self.judged + self.repeated) * self.judged_tokens / (self.windows * self.length)
        second = sum(min(number, _REPAIRED) for number in tried)
        last = sum(min(number, _LAST) for number in tried)
        repaired = _PASSES_OF_REPAIR * (self.repairs[0] * (second + further) + self.repairs[1] * last) / self.windows
        return judged * (1 + sum(tried) + second + further + last) + repaired


def least_judged(sources: int, *, processes: int) -> int:
    """Return how many windows of each source judge shapes at least, so that every process has one of them."""
    return max(_LEAST_OF_SOURCE, ceil(processes / sources))


def judged_of_source(windows: int, *, least: int) -> int:
    """Return how many of a source's windows judge shapes: every eighth, at least ``least``, at most half of them."""
    return min(max(min(windows // _JUDGED_PART, _MOST_OF_SOURCE), least), windows // 2)
