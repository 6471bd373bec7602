"""Fixtures that several files of attacks share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from helpers.commands import save_model
from helpers.live_server import CALM, HURRY, Live, running
from helpers.service import PROXY, ServiceHarness
from safetensors import safe_open


@pytest.fixture
def calm(tmp_path: Path) -> Iterator[Live]:
    """A server with timeouts."""
    with running(tmp_path, CALM) as live:
        yield live


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Live]:
    """A server without."""
    with running(tmp_path, HURRY) as live:
        yield live


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, made once."""
    return save_model(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(made, tmp_path / "root" / "model"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The weights files that transformers opens, with all links resolved."""
    found: list[Path] = []

    def watch(path: str, *arguments: Any, **options: Any) -> Any:
        found.append(Path(path).resolve())
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", watch)
    return found


@pytest.fixture
def closed(tmp_path: Path) -> tuple[ServiceHarness, str]:
    """A service behind a proxy, and a user's token."""
    harness = ServiceHarness(tmp_path, trusted_proxies=(PROXY,))
    return harness, harness.service.tokens.create("ann", "user")
