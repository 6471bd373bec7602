"""Positions that count in statistics: all but those of the begin-of-text token."""

from __future__ import annotations

import torch

from llmprune.layerwise.counted_positions import CountedPositions

WINDOWS = torch.tensor([[1, 5, 6, 7], [1, 8, 1, 9], [5, 6, 7, 8]])
VALUES = torch.arange(24.0).view(3, 4, 2)


def test_windows_without_the_token_are_left_as_they_are() -> None:
    """Values are returned themselves, so that nothing is computed or copied for them."""
    for counted in (CountedPositions(WINDOWS, 2), CountedPositions(WINDOWS, 2, begin=(3,))):
        kept = VALUES[:2]
        assert counted.select(0, kept) is kept
        assert counted.zero_others(0, kept) is kept
        assert counted.within(slice(-1, None)) is counted
        assert counted.targets(0, torch.device("cpu")) is None


def test_other_tokens_are_selected_batch_by_batch() -> None:
    """The token is left out at the begin of a window and of a document within it, in both shapes of values."""
    counted = CountedPositions(WINDOWS, 2, begin=(1,))
    wanted = torch.stack([VALUES[0, 1], VALUES[0, 2], VALUES[0, 3], VALUES[1, 1], VALUES[1, 3]])
    assert counted.select(0, VALUES[:2]).equal(wanted)
    assert counted.select(0, VALUES[:2].flatten(0, 1)).equal(wanted)
    assert counted.select(1, VALUES[2:]).equal(VALUES[2])


def test_values_of_some_tokens_only_are_not_selected_from() -> None:
    """A module that is called with some of the tokens keeps all of them: which they are is not known."""
    some_TX = torch.zeros(3, 2)
    assert CountedPositions(WINDOWS, 2, begin=(1,)).select(0, some_TX) is some_TX


def test_only_the_prediction_of_the_token_does_not_count() -> None:
    """That of the token after it does."""
    counted_BT = CountedPositions(WINDOWS, 2, begin=(1,)).targets(0, torch.device("cpu"))
    assert counted_BT is not None
    assert counted_BT.tolist() == [[True, True, True], [True, False, True]]


def test_positions_within_a_slice() -> None:
    """Of the last token of each window only that slice counts."""
    last = CountedPositions(WINDOWS.flip(1), 3, begin=(1,)).within(slice(-1, None))
    assert last.select(0, VALUES[:, -1:]).equal(VALUES[2:, -1])
