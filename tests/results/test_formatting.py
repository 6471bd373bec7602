"""Formats of figures at the limits of their units."""

from __future__ import annotations

import math

import pytest

from llmprune.common.schema import format_count, format_size
from llmprune.report.bench_table import energy, seconds
from llmprune.results.formatting import change, fixed, number, percent, short_model_name


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (999_499, "999 KB"),
        (999_600, "1 MB"),
        (999.6e6, "1 GB"),
        (999.9e9, "1 TB"),
        (1.5e15, "1.5 PB"),
        (2.5e21, "2,500 EB"),
    ],
)
def test_a_size_has_the_unit_that_its_rounded_figure_needs(size: float, text: str) -> None:
    """No size is written as 1,000 of a unit, or with an exponent."""
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999_960, "999,960"),
        (999_999.7, "1 M"),
        (1_000_000, "1 M"),
        (999_999_999, "1 B"),
        (134_515_008, "134.5 M"),
        (999.96e9, "1 T"),
        (12_345e12, "12,345 T"),
    ],
)
def test_a_count_has_the_unit_that_its_rounded_figure_needs(count: float, text: str) -> None:
    """No count is written as 1,000 of a unit or with an exponent."""
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (seconds(0.9997), "1 s"),
        (seconds(0.0412), "41.2 ms"),
        (seconds(1234.0), "1,234 s"),
        (seconds(999.9), "1,000 s"),
        (energy(0.9999), "1 J"),
        (energy(0.086), "86 mJ"),
        (number(999.96), "1,000"),
        (fixed(99.9997), "100"),
        (fixed(-0.0), "0.000"),
        (percent(-0.0001), "0.0%"),
        (percent(-0.05), "−5.0%"),
        (percent(math.nan), "not a number"),
        (percent(math.inf), "∞"),
        (change(2, math.inf), "∞"),
        (change(0, 5), "–"),
    ],
)
def test_figures_at_the_limits_of_their_formats(written: str, text: str) -> None:
    """A figure that rounds up to the next unit is written in that unit, and zero has no sign."""
    assert written == text


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("org/SmolLM2-135M", "SmolLM2-135M"),
        ("/models/base/", "base"),
        ("package://models/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"),
        ("gpt2", "gpt2"),
        ("/", "/"),
    ],
)
def test_a_model_is_named_by_the_last_part_of_its_place(model: str, short: str) -> None:
    """Hub ids, folders and addresses are shortened; a name without parts is unchanged."""
    assert short_model_name(model) == short
