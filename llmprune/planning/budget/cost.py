"""Cost of a search, from the schedule that it follows."""

from __future__ import annotations

from collections.abc import Sequence

from llmprune.common.distributed import world_size
from llmprune.common.errors import CalibrationError
from llmprune.planning.budget.candidates import Candidate
from llmprune.planning.budget.space import SearchSpace
from llmprune.planning.texts.calibration_sources import calibration_sources
from llmprune.recipe.calibration import Calibration
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.search_schedule import Schedule
from llmprune.results.figures.base import Figures


class SearchCost(Figures):
    """Shapes that each round of a search tries for all models of a family together, and what the search costs.

    ``judged_windows``, ``judged_tokens``: windows that shapes are judged on, and tokens of each. ``further``: shapes
    that go one step beyond a chosen one. ``forward_passes``: of the dense model over all calibration tokens;
    ``order_passes``: those that the order of the layers takes before.
    """

    rounds: tuple[int, ...]
    further: int
    judged_windows: int
    judged_tokens: int
    forward_passes: float
    order_passes: float


def search_cost(space: SearchSpace, tried: Sequence[Sequence[Candidate]], *, recipe: Recipe) -> SearchCost:
    """Return the cost of a search. ``tried``: candidates for each model of the family."""
    schedule = _schedule(recipe.calibration, quick=space.budget.quick)
    refit = schedule.repair_of(recipe.refit)
    numbers, further = [len(some) for some in tried], len(space.axes) * len(tried)
    later = (sum(min(number, most) for number in numbers) for most in (schedule.rounds if refit else ()))
    fewest = min(one.shape.layers for some in tried for one in some)
    return SearchCost(
        rounds=(sum(numbers), *later),
        further=further,
        judged_windows=schedule.judged + schedule.repeated,
        judged_tokens=schedule.judged_tokens,
        forward_passes=round(schedule.forward_passes(numbers, further=further, refit=refit), 2),
        order_passes=round(schedule.order_passes(space.dense.layers, removed=removals(space, fewest)), 2),
    )


def removals(space: SearchSpace, fewest: int) -> int:
    """Return the number of removals down to ``fewest`` layers, or one step beyond it where the space has one.

    Each removes one layer, or one group where the kinds of layers follow from their index.
    """
    return min(space.values.layers.index(fewest) + 1, len(space.values.layers) - 1)


def require_windows_to_search(calibration: Calibration) -> None:
    """Raise CalibrationError unless every process gets a window that judges shapes, and one that they are scored on."""
    schedule, processes = _schedule(calibration), world_size()
    others = schedule.windows - schedule.judged
    if not schedule.judged or min(schedule.judged + schedule.repeated, others) < processes:
        each = f" in each of {processes} processes" if processes > 1 else ""
        raise CalibrationError(
            f"budget: some calibration windows judge the shapes and others score and repair them{each}, for which the "
            f"recipe's {schedule.windows} are too few; raise calibration.samples to {max(16, 4 * processes)} or more"
        )


def _schedule(calibration: Calibration, *, quick: bool = False) -> Schedule:
    windows = [source.windows for source in calibration_sources(calibration)]
    return Schedule.of(windows, calibration.shape()[1], processes=world_size(), quick=quick)
