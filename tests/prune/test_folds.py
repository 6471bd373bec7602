"""Folds of the calibration windows."""

from __future__ import annotations

import pytest
import torch

from llmprune.prune.repair.folds import Folds, every_eighth
from llmprune.prune.repair.halves import most_different_halves


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_folds_are_sources_or_halves() -> None:
    """Windows of one source are held out together; of a single source, half of its windows."""
    windows_NL = torch.tensor([[1, 2, 3], [7, 8, 9], [3, 2, 1], [7, 9, 9]])
    for sources_N in (None, torch.zeros(4, dtype=torch.int64)):
        halves = Folds.of(windows_NL, sources_N)
        assert (halves.of_windows_N.tolist(), halves.are_sources) == ([0, 1, 0, 1], False)
    assert Folds.of(windows_NL, torch.tensor([2, 0, 1, 0])).of_windows_N.tolist() == [2, 0, 1, 0]


def test_halves_differ_in_their_tokens_whatever_the_order() -> None:
    """Two kinds of text in one source are two halves; each window is in the same half when the windows are shuffled."""
    one_NL, other_NL = (
        torch.randint(40, (8, 64), generator=_seeded()),
        torch.randint(30, 70, (8, 64), generator=_seeded()),
    )
    order_N = torch.randperm(16, generator=_seeded())
    found_N = most_different_halves(torch.cat([one_NL, other_NL])[order_N])
    assert found_N[0] == 0
    assert (found_N == found_N[order_N.argsort()[0]]).equal(order_N < 8)


@pytest.mark.parametrize(("count", "halves"), [(1, [0]), (2, [0, 1]), (5, [0, 0, 0, 1, 1])])
def test_equal_windows_are_split_by_their_order(count: int, halves: list[int]) -> None:
    """Nothing tells them apart, not even rounding; a single window leaves none to hold out."""
    assert most_different_halves(torch.arange(50).repeat(count, 1)).tolist() == halves


def test_generated_windows_are_a_fold_with_the_weight_of_the_others() -> None:
    """However many sources there are, no other text is in their fold."""
    sources_N = torch.tensor([4, 0, 1, 2, 3, 0, 4, 1, 2, 3])
    folds = Folds.of(torch.zeros(10, 4), sources_N, generated_N=sources_N == 4)
    assert folds.of_windows_N.tolist() == [3, 0, 1, 2, 0, 0, 3, 1, 2, 0]
    assert folds.weights == (1, 1, 1, 4)
    two = Folds.of(torch.zeros(3, 4), torch.tensor([0, 1, 0]), generated_N=torch.tensor([False, True, False]))
    assert (two.of_windows_N.tolist(), two.weights) == ([0, 1, 0], (1, 2))


def test_every_eighth_window_is_held_out() -> None:
    """Of fewer than eight windows the last is held out, but never the only one."""
    assert every_eighth(17).nonzero().flatten().tolist() == [7, 15]
    assert every_eighth(3).tolist() == [0, 0, 1]
    assert every_eighth(1).tolist() == [0]
