"""Windows that a search takes of the calibration."""

from __future__ import annotations

import pytest

from llmprune.recipe.search_schedule import Schedule


@pytest.mark.parametrize("by_source", [[64], [20, 44], [128] * 4])
@pytest.mark.parametrize("processes", [1, 4, 16])
def test_every_process_has_a_window_of_each_part(by_source: list[int], processes: int) -> None:
    """Windows that judge, order and repair are at least as many as the processes, and no two parts overlap."""
    found = Schedule.of(by_source, 512, processes=processes)
    assert min(found.judged, found.ordering, *found.repairs) >= processes
    assert max(found.ordering, *found.repairs) <= found.windows - found.judged


def test_processes_that_have_windows_change_nothing() -> None:
    """Where every process has windows, more of them judge the same shapes on the same text."""
    one, two = (Schedule.of([40, 60], 256, processes=number) for number in (1, 2))
    assert (one.judged, one.ordering, one.repairs) == (two.judged, two.ordering, two.repairs)


def test_a_single_window_judges_nothing() -> None:
    """A source keeps half of its windows for the scores, so that one alone is not taken."""
    assert Schedule.of([1, 2], 256).judged == 1
