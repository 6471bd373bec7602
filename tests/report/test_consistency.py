"""Consistency: page, terminal, model card and comparison show the same figure alike."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from helpers.reports import bare_report, card, sample_report, summary, task, with_confidence
from helpers.trained_reports import trained_report
from rich.console import Console
from rich.table import Table

from llmprune.report.bench_table import print_bench
from llmprune.report.html.compare_page import render_comparison
from llmprune.report.html.page import render_page
from llmprune.report.runs import Run
from llmprune.report.runs_table import print_runs
from llmprune.report.task_table import table_of_two
from llmprune.results.figures.bench import BenchFigures, BenchPoint, BenchSize, Pair, Spread
from llmprune.results.figures.evaluation import Interval, SpeedFigures, TaskFigures
from llmprune.results.report_schema import Report


def words(text: str) -> str:
    """Return text without tags, with single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def printed(table: Table) -> str:
    """Return a table as a terminal of 200 columns shows it."""
    return printed_by(lambda console: console.print(table))


def printed_by(write: Callable[[Console], None]) -> str:
    """Return the output of a function on a terminal of 200 columns."""
    output = io.StringIO()
    write(Console(file=output, width=200))
    return words(output.getvalue())


def everywhere(report: Report) -> dict[str, str]:
    """Return the text of each view of a report, by its name."""
    return {
        "page": words(render_page(report)),
        "terminal": words(summary(report)),
        "card": words(card(report).text),
        "tasks": printed(table_of_two(report.tasks, report.groups, mean=report.retention)),
        "compare": printed_by(lambda console: print_runs([Run("mine", report)], console)),
        "compare page": words(render_comparison([Run("mine", report)])),
    }


@pytest.mark.parametrize(("confidence", "text"), [(0.9, "90%"), (0.975, "97.5%"), (0.999, "99.9%")])
def test_an_interval_is_named_by_its_confidence(confidence: float, text: str) -> None:
    """Each view names the computed confidence and no other, with or without a gate."""
    for name, view in everywhere(with_confidence(confidence)).items():
        assert f"{text} interval" in view, name
        assert "95% interval" not in view.replace(f"{text} interval", ""), name
        assert "95 %" not in view, name


def test_runs_of_different_confidence_have_both_named() -> None:
    """The heading of a comparison names each confidence."""
    runs = [Run("one", with_confidence(0.9)), Run("two", with_confidence(0.99))]
    assert "90% or 99% interval" in words(render_comparison(runs))


def error_rate(**changes: Any) -> TaskFigures:
    """Return a task where lower is better: 0.2 dense, 0.25 pruned."""
    low = task("speech", "wer", dense=0.2, pruned=0.25, flips=(8, 3))
    inverted = {"retention": 0.8, "higher_is_better": False, "interval": Interval(low=0.7, high=0.9, confidence=0.95)}
    return low.model_copy(update=inverted | changes)


def test_a_metric_where_lower_is_better_is_marked_everywhere() -> None:
    """Each view shows the metric's direction, and none labels dense / pruned as a share of dense."""
    texts = everywhere(sample_report(tasks=(error_rate(),)))
    for name in ("page", "terminal", "card", "tasks"):
        assert "wer, lower is better" in texts[name], name
    assert "speech (wer, lower is better) 0.200 0.250 125.0% retained (dense / pruned) 80.0%" in texts["terminal"]
    assert "and dense / pruned where lower is better" in texts["card"]
    assert "Retained is dense / pruned where lower is better" in texts["page"]
    for text in everywhere(sample_report()).values():
        assert "dense / pruned" not in text


def test_the_speedup_is_the_ratio_of_the_speeds_shown() -> None:
    """20.95 and 24.76 tokens per second are 1.18× and 118.2% everywhere, for any ratio of the paired runs."""
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


def test_the_ratio_of_a_bench_is_that_of_the_medians_shown() -> None:
    """The range in brackets, quartiles of paired runs, always contains the ratio."""
    size = BenchSize(parameters=1, weights=4, disk=None, kv_bytes_per_token=None, decoded_bytes=4, joules=1.0)
    base, model = Spread(median=20.95, low=20, high=22), Spread(median=24.76, low=24, high=25)
    pair = Pair(base=base, model=model, ratio=Spread(median=1.21, low=1.2, high=1.23))
    point = BenchPoint(batch_size=1, context=8, first_token=pair, prefill=pair, decode=pair, peak=(100, 118))
    figures = BenchFigures(
        base="a", model="b", base_size=size, model_size=size, points=(point,), repeats=1, new_tokens=4, cache="dynamic",
        device="CPU", dtype="float32",
    )  # fmt: skip
    text = printed_by(lambda console: print_bench(figures, console))
    assert "decode/s 20.95 24.76 1.18× (1.18–1.23)" in text
    assert "peak memory 100 B 118 B 1.18×" in text
    assert "medians of 1 run of each model" in text


def test_a_report_without_evaluation_states_that_quality_was_not_measured() -> None:
    """Page, terminal and card state it; reports with tasks or perplexity do not."""
    for name, text in everywhere(bare_report()).items():
        if name in ("page", "terminal", "card"):
            assert "uality was not measured" in text, name
    assert "the table above says" not in card(bare_report()).text
    only_text = sample_report(tasks=(), mean_retention=None, retention=None, gate=None, generation=None)
    for report in (sample_report(), only_text):
        assert not [name for name, text in everywhere(report).items() if "uality was not measured" in text]


def test_a_training_is_said_everywhere() -> None:
    """Each view of a run names the tokens of a training after the cut, and none says that nothing was trained."""
    for name, text in everywhere(trained_report()).items():
        if name != "tasks":
            assert "122,880 tokens" in text, name
        assert "not trained" not in text
        assert "Nothing was trained" not in text
    for name in ("compare", "compare page"):
        assert "trained" not in everywhere(sample_report())[name]
