"""Shapes of a job's search on its page, and the recipe that each of them becomes."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from helpers.searching import searched
from helpers.service import ServiceHarness

from llmprune.recipe.recipe import Recipe
from llmprune.results.figures.search import SearchFigures
from llmprune.results.run_folder.products import SEARCH, SEARCH_SO_FAR

RECIPE = """\
model: {id: org/model}
calibration: {dataset: org/text}
budget:
  parameters: 0.75
  axes: {layers: {}, mlp: {criterion: {kind: wanda}}, heads: {}}
"""


def with_search(tmp_path: Path, found: SearchFigures, *, name: str = SEARCH) -> tuple[ServiceHarness, str]:
    """Return a service with a job whose run folder has these figures."""
    harness = ServiceHarness(tmp_path)
    job = str(harness.submit(RECIPE)["id"])
    folder = harness.run_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(found.model_dump_json())
    return harness, job


def test_a_shape_of_the_chart_becomes_the_recipe(tmp_path: Path) -> None:
    """Every shape is a link to the editor with the numbers of that shape in place of the budget."""
    found = searched()
    harness, job = with_search(tmp_path, found)
    page = harness.http.get(f"/jobs/{job}").text
    links = {unescape(link) for link in re.findall(r'<a href="(/submit\?[^"]*shape=[^"]*)"', page)}
    assert len(links) == len({one.name for one in found.tried})
    chosen = found.chosen_shape(0)
    link = next(link for link in links if "29+layers%2C+1088+neurons%2C+2+groups" in link)
    editor = harness.http.get(link).text
    written = unescape(re.search(r"<textarea[^>]*>(.*?)</textarea>", editor, re.DOTALL)[1])
    assert yaml.safe_load(written) == {
        "model": {"id": "org/model"},
        "calibration": {"dataset": "org/text"},
        "depth": {"layers": list(chosen.removed)},
        "width": {
            "neurons": 1088,
            "multiple": 64,
            "criterion": {"kind": "wanda"},
            "heads": 2,
            "heads_criterion": {"kind": "activation"},
        },
    }
    Recipe.parse(written)


def test_shapes_are_shown_while_they_are_found(tmp_path: Path) -> None:
    """The page asks for what is new; an answer without news leaves it, and with the focus, in place."""
    so_far = searched(tried=searched().tried[4:9], chosen=())
    harness, job = with_search(tmp_path, so_far, name=SEARCH_SO_FAR)
    page = harness.http.get(f"/jobs/{job}").text
    assert "Shapes as they are found" in page
    ask = re.search(rf'hx-get="(/jobs/{job}/search\?seen=\w+)"', page)[1]
    assert harness.http.get(ask).status_code == 204
    (harness.run_folder(job) / SEARCH).write_text(searched().model_dump_json())
    answer = harness.http.get(ask)
    assert answer.status_code == 200
    assert "Chosen:" in answer.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tried": []}'])
def test_figures_that_cannot_be_read_are_not_shown(tmp_path: Path, text: str) -> None:
    """A file that the run is just writing, or has damaged, is no reason for an error."""
    harness, job = with_search(tmp_path, searched())
    (harness.run_folder(job) / SEARCH).write_text(text)
    assert "No shape has been tried yet." in harness.http.get(f"/jobs/{job}").text
    answer = harness.http.get("/submit", params={"again": job, "shape": "28 layers", "size": 0})
    assert answer.status_code == 404


def test_a_job_without_a_budget_has_no_such_section(tmp_path: Path) -> None:
    """Nothing is asked for, and nothing is shown."""
    harness = ServiceHarness(tmp_path)
    job = harness.submit()["id"]
    assert 'id="found"' not in harness.http.get(f"/jobs/{job}").text
