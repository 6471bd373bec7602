"""A tiny dense model, a damaged copy of it as the repaired checkpoint, and windows to recover it on."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.recovering import save_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a dense and a damaged llama."""
    return save_pair(tmp_path_factory.mktemp("pair"), "llama")
