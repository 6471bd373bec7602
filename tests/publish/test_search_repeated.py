"""A model whose shape was searched, repeated from its record: the recorded choice in place of another search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.reports import sample_report
from helpers.searching import searched

from llmprune.common.errors import HubError
from llmprune.publish.plots import draw
from llmprune.publish.provenance import FILE, Record, portable_figures
from llmprune.publish.reproduce import recorded_recipe, recorded_search
from llmprune.recipe.recipe import Recipe

RECIPE = """\
model: {id: org/base}
calibration: {dataset: org/text}
budget: {parameters: 0.8, speed: 1.1, speed_table: /home/ann/table.json}
"""


def test_the_recorded_choice_is_taken_again(tmp_path: Path) -> None:
    """The budget stays, without the author's file; another budget is searched anew."""
    found = searched(0.9, 0.8, member=1)
    record = Record(
        created="today",
        recipe=RECIPE,
        overrides=(),
        cut={},
        fingerprints={},
        files={},
        refused=None,
        report=portable_figures(sample_report(search=found)),
    )
    (tmp_path / FILE).write_text(record.to_json())
    recipe, read = recorded_recipe(str(tmp_path))
    assert recipe.budget is not None
    assert (recipe.budget.parameters, recipe.budget.speed_table) == (0.8, None)
    assert recorded_search(read, recipe) == found
    other, read = recorded_recipe(str(tmp_path), ["budget.parameters=0.7"])
    assert recorded_search(read, other) is None


def test_a_recorded_search_that_cannot_be_read() -> None:
    """Figures that a stranger wrote are checked before they are used."""
    report = portable_figures(sample_report(search=searched())) | {"search": {"tried": "all"}}
    values: dict[str, Any] = {
        "created": "",
        "recipe": RECIPE,
        "overrides": (),
        "cut": {},
        "fingerprints": {},
        "files": {},
    }
    with pytest.raises(HubError, match="recorded search"):
        recorded_search(
            Record(**values, refused=None, report=report), Recipe.parse(RECIPE, ["budget.speed_table=null"])
        )


def test_the_frontier_is_drawn_for_the_card(tmp_path: Path) -> None:
    """A chart is written where the report has a search."""
    assert "frontier" in draw(sample_report(search=searched()), tmp_path)
    assert "frontier" not in draw(sample_report(), tmp_path)
