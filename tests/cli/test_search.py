"""``llmprune search``: its refusals, its output and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import command
from helpers.searching import searched

from llmprune.cli.search_command import show_search
from llmprune.results.figures.search import SearchFigures


def test_a_recipe_without_a_budget_is_refused(tmp_path: Path) -> None:
    """The message names the section and the other command."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {id: org/name}\ndepth: {remove: 1}\n")
    outcome = command("search", recipe)
    assert outcome.code == 2
    assert "has no section budget" in outcome.err
    assert "llmprune run" in outcome.err


def test_the_figures_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table is printed, the page in the run folder and the command that continues are named."""
    (tmp_path / "frontier.html").touch()
    show_search(searched(), tmp_path, recipe="mine.yaml", as_json=False)
    out = capsys.readouterr().out
    assert "On the frontier, by size:" in out
    assert f"llmprune run mine.yaml -o {tmp_path}" in out
    assert "frontier.html" in out


def test_json_is_alone_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--json`` standard output has the figures and nothing else."""
    (tmp_path / "frontier.html").touch()
    show_search(searched(), tmp_path, recipe="mine.yaml", as_json=True)
    out, err = capsys.readouterr()
    assert SearchFigures.model_validate(json.loads(out)) == searched()
    assert "frontier.html" in err
