"""How figures are written: one figure reads alike on the page, in the terminal, on the card and beside other runs."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from helpers.reports import bare_report, card, sample_report, summary, task, with_confidence
from rich.console import Console
from rich.table import Table

from llmprune.common.schema import format_count, format_size
from llmprune.pipeline.report import warn_of_unrouted_experts
from llmprune.report.bench_table import energy, print_bench, seconds
from llmprune.report.html.compare_page import render_comparison
from llmprune.report.html.page import render_page
from llmprune.report.runs import Run, print_runs
from llmprune.report.task_table import table_of_two
from llmprune.results.formatting import change, fixed, number, percent
from llmprune.results.schema import (
    BenchFigures,
    BenchPoint,
    BenchSize,
    Interval,
    Pair,
    Report,
    SpeedFigures,
    Spread,
    TaskFigures,
)


def words(text: str) -> str:
    """Text with single blanks and without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def printed(table: Table) -> str:
    """A table as a wide terminal shows it."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return words(console.file.getvalue())


def beside_others(report: Report) -> str:
    """The table of ``llmprune compare``."""
    console = Console(file=io.StringIO(), width=200)
    print_runs([Run("mine", report)], console)
    assert isinstance(console.file, io.StringIO)
    return words(console.file.getvalue())


def everywhere(report: Report) -> dict[str, str]:
    """Every surface that shows a report, as plain words."""
    return {
        "page": words(render_page(report)),
        "terminal": words(summary(report)),
        "card": words(card(report).text),
        "tasks": printed(table_of_two(report.tasks, report.groups, mean=report.retention)),
        "compare": beside_others(report),
        "compare page": words(render_comparison([Run("mine", report)])),
    }


@pytest.mark.parametrize(
    ("size", "said"),
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
def test_a_size_has_the_unit_that_its_rounded_figure_needs(size: float, said: str) -> None:
    """No size is written as 1,000 of a unit or with an exponent."""
    assert format_size(size) == said


@pytest.mark.parametrize(
    ("count", "said"),
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
def test_a_count_has_the_unit_that_its_rounded_figure_needs(count: float, said: str) -> None:
    """No count is written as 1,000 of a unit or with an exponent."""
    assert format_count(count) == said


@pytest.mark.parametrize(
    ("written", "said"),
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
def test_figures_at_the_borders_of_their_formats(written: str, said: str) -> None:
    """A figure that is rounded up to the next unit is written in it, and no zero has a sign."""
    assert written == said


@pytest.mark.parametrize(("confidence", "said"), [(0.9, "90%"), (0.975, "97.5%"), (0.999, "99.9%")])
def test_an_interval_is_called_by_its_confidence(confidence: float, said: str) -> None:
    """Each surface names the confidence that was computed, with a gate or without, and no other."""
    for name, text in everywhere(with_confidence(confidence)).items():
        assert f"{said} interval" in text, name
        assert "95% interval" not in text.replace(f"{said} interval", ""), name
        assert "95 %" not in text, name


def test_runs_of_different_confidence_are_told_apart() -> None:
    """The heading beside several runs names each confidence."""
    runs = [Run("one", with_confidence(0.9)), Run("two", with_confidence(0.99))]
    assert "90% or 99% interval" in words(render_comparison(runs))


def error_rate(**changes: Any) -> TaskFigures:
    """A task where lower is better: 0.2 became 0.25."""
    low = task("speech", "wer", 0.2, 0.25, lost=8, gained=3)
    inverted = {"retention": 0.8, "higher_is_better": False, "interval": Interval(low=0.7, high=0.9, confidence=0.95)}
    return low.model_copy(update=inverted | changes)


def test_a_metric_where_lower_is_better_is_called_so_wherever_it_stands() -> None:
    """The metric carries its direction, and no surface calls dense / pruned a share of dense or pruned / dense."""
    texts = everywhere(sample_report(tasks=(error_rate(),)))
    for name in ("page", "terminal", "card", "tasks"):
        assert "wer, lower is better" in texts[name], name
    assert "speech (wer, lower is better) 0.200 0.250 125.0% retained (dense / pruned) 80.0%" in texts["terminal"]
    assert "and dense / pruned where lower is better" in texts["card"]
    assert "Retained is dense / pruned where lower is better" in texts["page"]
    for text in everywhere(sample_report()).values():
        assert "dense / pruned" not in text


def test_the_factor_of_speed_is_that_of_the_speeds_beside_it() -> None:
    """20.95 and 24.76 tokens per second make 1.18× and 118.2% everywhere, whatever the paired runs came to."""
    found = sample_report().speed
    assert isinstance(found, SpeedFigures)
    speed = found.model_copy(
        update={"dense": 20.95, "pruned": 24.76, "ratio": 1.21, "ratio_low": 1.15, "ratio_high": 1.27, "repeats": 3}
    )
    texts = everywhere(sample_report(speed=speed))
    assert texts["page"].count("1.18×") == 2
    assert "1.15–1.27× over 3 pairs of runs" in texts["page"]
    assert "generated tokens/s 20.95 24.76 118.2%" in texts["terminal"]
    assert "| generated tokens/s | 20.95 | 24.76 | 118.2% |" in texts["card"]
    assert "1.18×" in texts["compare"]
    assert "1.18×" in texts["compare page"]
    assert not [name for name, text in texts.items() if "1.21" in text or "121" in text]


def test_the_factors_of_a_bench_are_those_of_the_medians_beside_them() -> None:
    """The bracket, quartiles of paired runs, always holds the factor."""
    size = BenchSize(parameters=1, weights=4, disk=None, kv_bytes_per_token=None, decoded_bytes=4, joules=1.0)
    base, model = Spread(median=20.95, low=20, high=22), Spread(median=24.76, low=24, high=25)
    pair = Pair(base=base, model=model, ratio=Spread(median=1.21, low=1.2, high=1.23))
    point = BenchPoint(batch_size=1, context=8, first_token=pair, prefill=pair, decode=pair, peak=(100, 118))
    figures = BenchFigures(
        base="a", model="b", base_size=size, model_size=size, points=(point,), repeats=1, new_tokens=4, cache="dynamic",
        device="CPU", dtype="float32",
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    print_bench(figures, console)
    assert isinstance(console.file, io.StringIO)
    text = words(console.file.getvalue())
    assert "decode/s 20.95 24.76 1.18× (1.18–1.23)" in text
    assert "peak memory 100 B 118 B 1.18×" in text
    assert "medians of 1 run of each model" in text


def test_a_report_without_evaluation_says_that_quality_was_not_measured() -> None:
    """Smaller is all that is known: page, terminal and card say so; a report with tasks or perplexity does not."""
    for name, text in everywhere(bare_report()).items():
        if name in ("page", "terminal", "card"):
            assert "uality was not measured" in text, name
    assert "the table above says" not in card(bare_report()).text
    only_text = sample_report(tasks=(), mean_retention=None, retention=None, gate=None, generation=None)
    for report in (sample_report(), only_text):
        assert not [name for name, text in everywhere(report).items() if "uality was not measured" in text]


def test_one_of_a_kind_is_not_written_as_many() -> None:
    """One expert in one layer, and the dots only where more layers follow."""
    import torch

    from llmprune.score.scores import Scores

    few = Scores(None, {}, routed={"3.mlp": torch.tensor([1, 0])})
    assert warn_of_unrouted_experts(few)[0].startswith("1 expert in 1 layer (3.mlp) got no calibration token")
    many = Scores(None, {}, routed={f"{layer}.mlp": torch.tensor([0, 0]) for layer in range(4)})
    assert warn_of_unrouted_experts(many)[0].startswith("8 experts in 4 layers (0.mlp, 1.mlp, 2.mlp, …)")
