"""Cost of a search by successive halving, in plain forward passes of the dense model over the calibration tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.results.figures import Figures


@dataclass(frozen=True)
class SearchSchedule:
    """Schedule of a search: each round judges fewer shapes on more windows, the last one repaired shapes.

    ``repair_passes``: forward passes that a repair of a shape costs over its windows, of the calibration's length.
    """

    windows: int = 8  # of the first round
    length: int = 256  # tokens of a window
    growth: int = 3  # the second round has so many times the windows, and the shapes divided by it
    repaired: int = 4
    repair_windows: int = 16
    repair_passes: int = 5


SCHEDULE = SearchSchedule()


class SearchRound(Figures):
    """Round of a search: shapes that are judged, on how many windows, and whether they are repaired before."""

    shapes: int
    windows: int
    repaired: bool = False


class SearchCost(Figures):
    """Cost of the search for all models of a family.

    ``tokens``: that pass through a model, counted as tokens of the dense model; ``forward_passes``: the same in passes
    over the calibration tokens.
    """

    rounds: tuple[SearchRound, ...]  # of each model of the family
    length: int  # tokens of a window
    tokens: int
    forward_passes: float


def search_cost(
    shapes: Sequence[Sequence[float]], *, calibration: tuple[int, int], schedule: SearchSchedule = SCHEDULE
) -> SearchCost:
    """Return the cost of a search.

    ``shapes``: for each model of the family the size of every tried shape, as a fraction of the dense model's;
    ``calibration``: windows, and tokens in each.
    """
    windows, length = calibration
    more = schedule.windows * schedule.growth
    judged, tokens = more * schedule.length, float(more * schedule.length)  # the dense model's own logits
    of_repair = schedule.repair_passes * min(schedule.repair_windows, windows) * length
    rounds = [(0, 0, 0)]
    for sizes in shapes:
        second, last = -(-len(sizes) // schedule.growth), min(schedule.repaired, len(sizes))
        rounds.append((len(sizes), second, last))
        mean = sum(sizes) / len(sizes)
        first = schedule.windows * schedule.length * len(sizes)
        tokens += mean * (first + judged * second + (of_repair + judged) * last)
    first, second, last = (max(numbers) for numbers in zip(*rounds, strict=True))
    return SearchCost(
        rounds=(
            SearchRound(shapes=first, windows=schedule.windows),
            SearchRound(shapes=second, windows=more),
            SearchRound(shapes=last, windows=more, repaired=True),
        ),
        length=schedule.length,
        tokens=round(tokens),
        forward_passes=round(tokens / (windows * length), 2),
    )
