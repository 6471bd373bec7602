"""Folds of the calibration windows."""

from __future__ import annotations

import torch

from llmprune.prune.repair.folds import every_eighth, folds_of


def test_folds_are_sources_or_halves() -> None:
    """Windows of one source are held out together; of a single source, the first half and the second."""
    assert folds_of(4, None).tolist() == [0, 0, 1, 1]
    assert folds_of(4, torch.zeros(4, dtype=torch.int64)).tolist() == [0, 0, 1, 1]
    assert folds_of(4, torch.tensor([2, 0, 1, 0])).tolist() == [2, 0, 1, 0]


def test_every_eighth_window_is_held_out() -> None:
    """Of fewer than eight windows the last is held out, but never the only one."""
    assert every_eighth(17).nonzero().flatten().tolist() == [7, 15]
    assert every_eighth(3).tolist() == [0, 0, 1]
    assert every_eighth(1).tolist() == [0]
