"""A tiny base model for the tests of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.commands import save_model, verify_here, write_text


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a tiny model, ``base``, and ``text.txt``."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "base")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """Copy the model for a test that changes it."""
    return Path(shutil.copytree(made / "base", tmp_path / "base"))


@pytest.fixture
def quick_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify checkpoints in the test's process."""
    verify_here(monkeypatch)
