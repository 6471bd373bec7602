"""Folds of the calibration windows."""

from __future__ import annotations

import torch

from llmprune.prune.repair.folds import Folds, every_eighth


def test_folds_are_sources_or_halves() -> None:
    """Windows of one source are held out together; of a single source, the first half and the second."""
    assert Folds.of(4, None).of_windows_N.tolist() == [0, 0, 1, 1]
    assert Folds.of(4, torch.zeros(4, dtype=torch.int64)).of_windows_N.tolist() == [0, 0, 1, 1]
    assert Folds.of(4, torch.tensor([2, 0, 1, 0])).of_windows_N.tolist() == [2, 0, 1, 0]


def test_generated_windows_are_a_fold_with_the_weight_of_the_others() -> None:
    """However many sources there are, no other text is in their fold."""
    sources_N = torch.tensor([4, 0, 1, 2, 3, 0, 4, 1, 2, 3])
    folds = Folds.of(10, sources_N, generated_N=sources_N == 4)
    assert folds.of_windows_N.tolist() == [3, 0, 1, 2, 0, 0, 3, 1, 2, 0]
    assert folds.weights == (1, 1, 1, 4)
    two = Folds.of(3, torch.tensor([0, 1, 0]), generated_N=torch.tensor([False, True, False]))
    assert (two.of_windows_N.tolist(), two.weights) == ([0, 1, 0], (1, 2))


def test_every_eighth_window_is_held_out() -> None:
    """Of fewer than eight windows the last is held out, but never the only one."""
    assert every_eighth(17).nonzero().flatten().tolist() == [7, 15]
    assert every_eighth(3).tolist() == [0, 0, 1]
    assert every_eighth(1).tolist() == [0]
