"""Cost of a search, from the schedule that it follows."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.planning.calibration_sources import calibration_sources
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.search_schedule import Schedule
from llmprune.results.figures import Figures


class SearchCost(Figures):
    """Shapes that each round of a search tries for all models of a family together, and what the search costs.

    ``judged_windows``, ``judged_tokens``: windows that shapes are judged on, and tokens of each. ``further``: shapes
    that go one step beyond a chosen one. ``forward_passes``: of the dense model over all calibration tokens.
    """

    rounds: tuple[int, ...]
    further: int
    judged_windows: int
    judged_tokens: int
    forward_passes: float


def search_cost(tried: Sequence[int], calibration: Calibration, *, axes: int) -> SearchCost:
    """Return the cost of a search. ``tried``: shapes for each model of the family; ``axes``: that can give."""
    windows = [source.windows for source in calibration_sources(calibration)]
    schedule = Schedule.of(windows, calibration.shape()[1])
    further = axes * len(tried)
    later = (sum(min(number, most) for number in tried) for most in schedule.rounds)
    return SearchCost(
        rounds=(sum(tried), *later),
        further=further,
        judged_windows=schedule.judged + schedule.repeated,
        judged_tokens=schedule.judged_tokens,
        forward_passes=round(schedule.forward_passes(tried, further=further), 2),
    )
