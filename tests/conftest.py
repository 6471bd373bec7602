"""Tiny models only lose by more threads, here and in the processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of base models stay in the test, and none that the user has is taken."""
    folder: Path = tmp_path_factory.mktemp("baselines", numbered=True)
    monkeypatch.setattr("llmprune.evaluation.harness.baselines_folder", lambda: folder)
