"""Search for a shape on the report page, on a page of its own, and in the terminal."""

from __future__ import annotations

import io
import math
import re
from html import unescape

import pytest
from helpers.reports import sample_report, summary
from helpers.searching import SOURCES, searched, tried, with_broken, with_speed
from rich.console import Console

from llmprune.report.html.frontier_page import render_frontier
from llmprune.report.html.page import render_page
from llmprune.report.search_table import print_search
from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.report_schema import Report
from llmprune.results.sentences.search import describe_search

ONE = with_broken(searched())
FAMILY = with_speed(searched(0.9, 0.8, 0.7))


def printed(found: SearchFigures) -> str:
    """Return the tables as a terminal of 80 columns prints them."""
    console = Console(file=io.StringIO(), width=80)
    print_search(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def places(page: str, name: str) -> list[str]:
    """Return all coordinates of a chart."""
    drawing = page.partition(f'id="{name}-title"')[2].partition("</svg></div>")[0]
    return re.findall(r' (?:x|y|x1|x2|y1|y2|points)="([^"]*)"', drawing)


def test_a_report_with_a_search_is_read_back_from_its_json() -> None:
    """All figures of the search are in ``report.json``."""
    report = sample_report(search=FAMILY)
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    "said",
    [
        "20 of 61 shapes that meet the budget were tried",
        "12,288 tokens) of 3 sources; cost: 6.4 forward passes over the calibration text, 12 min 34 s.",
        "Budget: at most 100.9 M parameters.",
        "29 layers, 1088 neurons, 2 groups: 99.97 M parameters (74.3% of the dense model), score 0.308 after the ",
        "The best shape that only removes layers (20 layers, 1536 neurons, 3 groups) has 0.978 against 0.559 before",
        "layers: 28 layers, 1088 neurons, 2 groups, −2.5% parameters, score +0.042.",
        "21 layers, 1472 neurons, 3 groups is broken on code: KL divergence 4.900 there",
        "All 23 shapes that were tried",
    ],
)
def test_the_pages_say_why_this_shape(said: str) -> None:
    """Choice, margin over the single axes, cost of a step further, broken shapes and cost of the search are said."""
    for page in (render_page(sample_report(search=ONE)), render_frontier(ONE, "org/base")):
        assert said in " ".join(page.split())


def test_a_single_candidate_is_said_in_the_singular() -> None:
    """A model that gives one axis alone often has one shape for a budget."""
    only = ONE.chosen[0].model_copy(update={"candidates": 1, "tried": 1})
    assert "1 of 1 shape that meets the budget " in " ".join(
        printed(ONE.model_copy(update={"chosen": (only,)})).split()
    )


def test_fewer_tokens_are_said_with_the_search() -> None:
    """A reader learns that sizes count them and divergences do not; without a cut of the vocabulary nothing is said."""
    assert "each keeps 25,728 tokens, and was judged with all" in describe_search(searched(vocabulary=25_728))
    assert "judged with all" not in describe_search(searched())


def test_the_chart_marks_the_kinds_of_shapes() -> None:
    """One marker for each tried shape, the chosen one ringed, the name of a frontier shape beside it."""
    page = render_page(sample_report(search=ONE))
    drawing = page.partition('id="frontier-title"')[2].partition("</svg></div>")[0]
    assert drawing.count('<svg class="point"') == len(ONE.tried)
    assert drawing.count('class="ring"') == 1
    assert drawing.count('class="mark broken"') == 1
    assert drawing.count('class="mark single') == 2
    assert ">29 layers, 1088 neurons, 2 groups</text>" in drawing


def test_a_shape_outside_the_frontier_never_lies_below_it() -> None:
    """No tried shape that is comparable has both fewer parameters and less divergence than one of the frontier."""
    for found in (ONE, FAMILY):
        line = found.frontier
        assert [one.parameters for one in line] == sorted((one.parameters for one in line), reverse=True)
        repaired = [one for one in found.tried if one.repaired and one.broken is None]
        assert not [
            (one, other)
            for one in line
            for other in repaired
            if other.parameters <= one.parameters and other.score < one.score
        ]


def test_a_family_has_a_section_for_each_budget_and_the_report_of_a_member_its_own_alone() -> None:
    """A member's report describes the choice for its budget; the chart shows all."""
    page = render_frontier(FAMILY, "org/base")
    assert page.count("<strong>Chosen:</strong>") == 3
    assert "At most 107.6 M parameters, at least 1.20× the dense model's speed." in unescape(page)
    assert 'id="speed-frontier-title"' in page
    member = render_page(sample_report(search=FAMILY.model_copy(update={"member": 1})))
    assert member.count("<strong>Chosen:</strong>") == 1
    assert "predicted 1.29× the dense model's, measured 1.24× (prediction off by 4.4%)" in " ".join(
        unescape(member).split()
    )


def test_before_the_repair_the_frontier_is_of_shapes_as_cut() -> None:
    """While no shape is repaired, all are compared; without a choice the page still has chart and table."""
    cut = tuple(one for one in ONE.tried if not one.repaired)
    found = ONE.model_copy(update={"tried": cut, "chosen": ()})
    assert found.frontier
    page = render_frontier(found, "org/base")
    assert "Chosen:" not in page
    assert 'id="frontier-title"' in page


def test_a_shape_that_dropped_out_earlier_is_compared_in_the_same_round() -> None:
    """A shape that was not repaired is compared with the chosen one as that was before its repair."""
    text = " ".join(unescape(render_frontier(ONE, "org/base")).split())
    alone = next(one for one in ONE.tried if one.name == "20 layers, 1536 neurons, 3 groups")
    chosen = ONE.chosen_shape(0)
    assert not alone.repaired
    assert f"has {alone.score:.3f} against {chosen.scores[0]:.3f} before the repair" in text


@pytest.mark.parametrize("value", [0.0, 1e-12, 4e7, math.inf, math.nan])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_any_search_can_be_drawn(value: float, number: int) -> None:
    """Broken figures, equal sizes and a single shape have coordinates within the page."""
    shapes: list[TriedShape] = [tried(28, 1024, 2) for _ in range(number)]
    shapes[-1] = shapes[-1].model_copy(
        update={"score": value, "scores": (value,), "divergence": dict.fromkeys(SOURCES, value)}
    )
    page = render_frontier(ONE.model_copy(update={"tried": tuple(shapes), "chosen": ()}), "org/base")
    assert not [place for place in places(page, "frontier") if "nan" in place or "inf" in place]


def test_names_from_files_are_escaped() -> None:
    """A source's name that is markup stays text."""
    attack = '"><img src=x>'
    found = with_broken(ONE, source=attack)
    page = render_frontier(found.model_copy(update={"sources": (*SOURCES, attack)}), attack)
    assert "<img" not in page


def test_the_terminal_shows_choice_and_frontier_in_80_columns() -> None:
    """The table has the divergence by source; of many sources it names the worst."""
    text = printed(ONE)
    rows = {" ".join(line.split()) for line in text.splitlines()}
    assert "29 1,088 2 99.97 M 74.3% 0.308 0.252 0.379 0.292 chosen" in rows
    assert "- one step further in layers: 28 layers, 1088 neurons, 2 groups, −2.5%" in rows
    many = tuple(f"source {place}" for place in range(9))
    shapes = tuple(
        one.model_copy(update={"divergence": {name: one.score + place / 100 for place, name in enumerate(many)}})
        for one in searched().tried
    )
    wide = printed(ONE.model_copy(update={"sources": many, "tried": shapes}))
    assert "source 8 0.388 chosen" in " ".join(wide.split())
    for shown in (text, wide, printed(FAMILY), summary(sample_report(search=ONE))):
        assert max(map(len, shown.splitlines())) <= 80


def test_the_summary_of_a_run_says_how_its_shape_was_found() -> None:
    """Two lines: the search, and the choice with its margin."""
    text = " ".join(summary(sample_report(search=ONE)).split())
    assert "Search 29 layers, 1088 neurons, 2 groups: 99.97 M parameters" in text
    assert "Search" not in summary(sample_report())
