"""A training in the report: its figures, its charts and what went wrong."""

from __future__ import annotations

import math
import re

import pytest
from helpers.page_outline import PageOutline
from helpers.reports import sample_report, summary
from helpers.trained_reports import trained, trained_report

from llmprune.report.html.page import render_page


@pytest.mark.parametrize(
    "figure",
    [
        "trained on 122,880 tokens",
        "All weights trained on the dense model",
        "in 60 steps of 2,048, learning rate up to 0.0003, 15 min 3 s, about 12.7 Wh.",
        "Held-out KL divergence 0.587 → 0.423 nats per token, mean of 3 sources; saved: the weights of step 60, the",
        "2 · code",
        "<td>0.830</td><td>0.710</td>",
        "105.2%<small>101.3–109.4%</small>",
        "<td>12 / 27</td>",
        "before the training: 26.31; trained: 21.94",
        "web: 0.410 to 0.260",
        "sampled from the dense model",
    ],
)
def test_the_page_shows_a_training(figure: str) -> None:
    """What was trained, the divergence of each source before and after, scores with intervals, and the text."""
    assert figure in render_page(trained_report())


def test_a_training_that_went_wrong_says_so() -> None:
    """Worse sources, setbacks and notes stand on the page and the terminal; without a gain the weights are the old."""
    unlike = {"web": 0.4, "code": 0.9}
    mixed = trained(unlike, after={"web": 0.2, "code": 1.1}, setbacks=2, notes=("the text was repeated 5 times",))
    useless = trained(unlike, after={"web": 0.6, "code": 1.1}, best=0)
    for said, recovery in (
        ("urther from the dense model than before the training: code (0.900 → 1.100)", mixed),
        ("he training diverged and returned to its last good weights 2 times", mixed),
        ("he text was repeated 5 times", mixed),
        ("o step came closer to the dense model", useless),
    ):
        report = trained_report(recovery=recovery, recovery_scores=None)
        for view in (render_page(report), summary(report)):
            assert said in " ".join(view.split())
    assert "further from" not in render_page(trained_report(recovery=useless))


@pytest.mark.parametrize("sources", [1, 9, 20])
@pytest.mark.parametrize("value", [0.0, 1e-9, 4e7, math.inf, math.nan])
def test_any_training_can_be_drawn(sources: int, value: float) -> None:
    """Lines of many sources, of broken figures and of one that is zero have coordinates within the page."""
    before = {f"source {number}": 0.3 + number / 7 for number in range(sources)}
    recovery = trained(before, after=before | {"source 0": value})
    page = render_page(trained_report(recovery=recovery))
    PageOutline(page)
    drawing = page.partition('id="recovery-title"')[2].partition("</svg></div>")[0]
    assert drawing.count("<polyline") == sources
    for place in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|points)="([^"]*)"', drawing):
        assert "nan" not in place
        assert "inf" not in place


def test_a_training_without_steps_has_no_chart() -> None:
    """Where nothing was trained the section has the table alone."""
    first = trained({"web": 0.4}, after={"web": 0.4}, best=0)
    page = render_page(trained_report(recovery=first.model_copy(update={"checks": first.checks[:1], "steps": 0})))
    assert "recovery-title" not in page
    assert "<td>0.400</td><td>0.400</td>" in page


def test_the_summary_shows_a_training_in_80_columns() -> None:
    """Scores and perplexity before the training stand below those after it, and a table has every source."""
    text = summary(trained_report())
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "before the training 26.31 173.0%",
        "before the training 0.514 88.2%",
        "code 0.830 0.710 20.00 45.87 40.68",
        "before 106.1% (102.1–110.2%)",
    } <= rows
    assert max(map(len, text.splitlines())) <= 80
    assert "before the training" not in summary(sample_report())
