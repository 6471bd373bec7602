"""Targets of the next-token loss: begin-of-text tokens do not count."""

from __future__ import annotations

import torch

from llmprune.layerwise.counted_targets import CountedTargets

CPU = torch.device("cpu")
WINDOWS = torch.tensor([[1, 5, 6, 7], [1, 8, 1, 9], [5, 6, 7, 1]])


def test_only_the_prediction_of_the_token_does_not_count() -> None:
    """That of the token after it does, at the begin of a window and within it."""
    targets = CountedTargets(WINDOWS, 2, begin=(1,))
    first_BT, second_BT = (targets.of(batch, CPU) for batch in (0, 1))
    assert first_BT is not None
    assert second_BT is not None
    assert first_BT.tolist() == [[True, True, True], [True, False, True]]
    assert second_BT.tolist() == [[True, True, False]]


def test_windows_without_the_token_need_no_mask() -> None:
    """Nothing is masked, nor copied to a device, where every target counts: as where windows only begin with it."""
    assert CountedTargets(WINDOWS, 2).of(0, CPU) is None
    assert CountedTargets(WINDOWS, 2, begin=(3,)).of(0, CPU) is None
    assert CountedTargets(WINDOWS[:1], 2, begin=(1,)).of(0, CPU) is None


def test_targets_before_a_position_do_not_count() -> None:
    """From that position of a window on they do, but for the tokens that never count."""
    counted_BT = CountedTargets(WINDOWS, 3, begin=(1,), first=2).of(0, CPU)
    assert counted_BT is not None
    assert counted_BT.tolist() == [[False, True, True], [False, False, True], [False, True, False]]
