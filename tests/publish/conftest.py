"""Fixtures of the push tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import command, save_model, verify_here, write_recipe, write_text
from helpers.hub.published import CARD, copy_run, draw_nothing


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of a tiny model; tests change only copies."""
    folder = tmp_path_factory.mktemp("done")
    base, text = save_model(folder / "base"), write_text(folder / "text.txt")
    (base / "README.md").write_text(CARD)
    (base / "LICENSE").write_text("Do as you like.\n")
    recipe = write_recipe(folder / "recipe.yaml", base, text)
    with pytest.MonkeyPatch.context() as patch:
        verify_here(patch)
        outcome = command("run", recipe, "--output", folder / "run")
    assert outcome.code == 0, outcome.err
    return folder / "run"


@pytest.fixture
def run(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the finished run for one test, without drawing charts."""
    draw_nothing(monkeypatch)
    return copy_run(done, tmp_path / "run")
