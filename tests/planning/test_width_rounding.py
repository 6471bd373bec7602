"""MLP widths are rounded to multiples of 256, of 128, or of a power of two that divides the width."""

from __future__ import annotations

import pytest

from llmprune.recipe.width_rounding import round_width, width_step


@pytest.mark.parametrize(
    ("wanted", "width", "expected"),
    [
        (0.75 * 14336, 14336, 10752),
        (9200, 14336, 9216),
        (9087, 14336, 8960),
        (3712, 4096, 3584),
        (1600, 2048, 1536),
        (1408, 1920, 1408),
        (1, 1536, 128),
        (1536, 1536, 1536),
        (0.5 * 11008, 11008, 5632),
        (60, 96, 64),
        (5, 7, 5),
    ],
)
def test_widths_are_rounded_to_the_nearest_multiple(wanted: float, width: int, expected: int) -> None:
    """A rounded width is a multiple of the step, never zero, and never more than the dense width."""
    assert round_width(wanted, width) == expected
    assert expected % width_step(width) == 0
