"""Choice among shapes by several sources of text."""

from __future__ import annotations

import math

import pytest

from llmprune.search.choice import broken_sources, ranked, score

WHOLE = (1.0,) * 4


def test_the_lowest_score_is_best() -> None:
    """Shapes are ranked by their geometric mean over the sources; of equal ones the earlier comes first."""
    assert ranked([(0.3, 0.3), (0.1, 0.2), (0.2, 0.1), (0.5, 0.2)], WHOLE) == [1, 2, 0, 3]


def test_sources_count_by_ratios() -> None:
    """A source with small divergences has the same say as one with large ones."""
    assert ranked([(0.01, 1.0), (0.02, 0.8)], WHOLE[:2]) == [0, 1]


def test_missing_layers_are_a_handicap() -> None:
    """A shape without a fifth of the layers must be better by a fifth than one with all of them."""
    assert score((0.2, 0.2), 0.8) == pytest.approx(0.25)
    assert ranked([(0.2, 0.2), (0.24, 0.24)], (0.8, 1.0)) == [1, 0]
    assert ranked([(0.2, 0.2), (0.26, 0.26)], (0.8, 1.0)) == [0, 1]


def test_a_broken_source_outweighs_the_score() -> None:
    """A shape that is best on average loses where one source finds it far worse than the others do."""
    tried = [(0.05, 0.05, 0.66), (0.30, 0.30, 0.20), (0.31, 0.31, 0.21), (0.32, 0.32, 0.22)]
    assert broken_sources(tried) == [2, None, None, None]
    assert ranked(tried, WHOLE) == [1, 2, 3, 0]


def test_a_hard_source_breaks_nothing() -> None:
    """A source on which every shape loses much is no fault of one of them, and a single source finds none."""
    assert broken_sources([(0.1, 1.0), (0.12, 1.2), (0.2, 2.1)]) == [None] * 3
    assert broken_sources([(0.1,), (5.0,)]) == [None] * 2


def test_infinite_divergence_is_broken() -> None:
    """A shape whose divergence is not a number is last, and the source is named."""
    tried = [(math.nan, 0.1), (0.9, 0.8), (1.0, math.inf)]
    assert broken_sources(tried) == [0, None, 1]
    assert ranked(tried, WHOLE[:3])[0] == 1
