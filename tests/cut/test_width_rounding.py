"""Widths rounded to multiples that hardware computes fast."""

from __future__ import annotations

import pytest

from llmprune.cut.decision import round_width, width_step


@pytest.mark.parametrize(
    ("wanted", "width", "expected"),
    [
        (0.75 * 14336, 14336, 10752),
        (9200, 14336, 9216),
        (9087, 14336, 9088),
        (1, 1536, 128),
        (1536, 1536, 1536),
        (0.5 * 11008, 11008, 5504),
        (60, 96, 64),
        (5, 7, 5),
    ],
)
def test_width_rounds_to_what_hardware_likes(wanted: float, width: int, expected: int) -> None:
    """A multiple of 128, or of the largest power of two that divides the width; never none, never more."""
    assert round_width(wanted, width) == expected
    assert expected % width_step(width) == 0
