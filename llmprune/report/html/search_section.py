"""Section of a page about the search for a shape: sentences, the frontier as a chart and a table, all tried shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmprune.report.html.frontier_chart import SPEED, Link, frontier_chart, marker
from llmprune.report.html.shape_rows import ShapeTable, shape_table
from llmprune.results.figures.search import SearchFigures, TriedShape
from llmprune.results.sentences.search import BudgetSentences, describe_broken, describe_budgets, describe_search


@dataclass(frozen=True)
class SearchView:
    """Parts of the section. ``kinds``: the legend of the chart, a marker and its meaning each."""

    summary: str
    choices: list[BudgetSentences]
    chart: Markup | None
    speed_chart: Markup | None
    kinds: list[tuple[Markup, str]]
    frontier: ShapeTable
    tried: ShapeTable
    broken: list[str]
    mixed: bool  # some shapes were repaired and others not
    notes: Sequence[str]


def view_search(found: SearchFigures, *, link: Link | None = None) -> SearchView:
    """Return the parts of the section. ``link``: address behind each shape of the chart and the tables."""
    line = found.frontier
    ordered = sorted(found.tried, key=lambda one: (-one.parameters, one.score))
    return SearchView(
        summary=describe_search(found) if found.chosen else "",
        choices=describe_budgets(found),
        chart=frontier_chart(found, link=link),
        speed_chart=frontier_chart(found, SPEED, link=link) if found.speed_frontier else None,
        kinds=_kinds(found),
        frontier=shape_table(found, line, link=link),
        tried=shape_table(found, ordered, link=link),
        broken=describe_broken(found),
        mixed=len({one.repaired for one in found.tried}) > 1,
        notes=found.notes,
    )


def _kinds(found: SearchFigures) -> list[tuple[Markup, str]]:
    """Return the legend of the chart: the kinds of shapes that occur."""
    chosen = {(one.name, size) for size, one in enumerate(found.chosen)}

    def is_single(one: TriedShape) -> bool:
        return one.broken is None and one.further is None and len(found.axes(one)) == 1

    occurs = {
        "chosen": ("chosen", bool(chosen)),
        "frontier": ("on the frontier", bool(found.frontier)),
        "candidate": ("other shapes", len(found.tried) > len(found.frontier)),
        "single": ("cut in a single axis", any(map(is_single, found.tried))),
        "further": ("one step further", any(one.further for one in found.tried)),
        "broken": ("broken on a source", any(one.broken for one in found.tried)),
    }
    return [(marker(kind), words) for kind, (words, is_there) in occurs.items() if is_there]
