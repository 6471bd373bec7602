"""The Dockerfile copies what the image is built from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from generate import hooks

ROOT = Path(__file__).parents[1]


def copied() -> set[str]:
    """Return the files and folders of the repository that the Dockerfile copies."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    return {name for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE) for name in line.split()[:-1]}


def lies_in(path: Path, names: set[str]) -> bool:
    """Return whether a path is one of the names or lies in one of them."""
    return any(path == Path(name) or Path(name) in path.parents for name in names)


def test_what_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    """Every source exists, and .dockerignore leaves it in."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert copied()
    assert [name for name in copied() if not (ROOT / name).exists() or not lies_in(Path(name), kept)] == []


def test_the_image_has_what_the_documentation_is_generated_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of the repository that the generated parts read are copied."""
    found: set[Path] = set()
    read_text = Path.read_text

    def watch(path: Path, *arguments: Any, **options: Any) -> str:
        found.add(path.resolve())
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", watch)
    for part in hooks.PARTS.values():
        part()
    read = {path.relative_to(ROOT) for path in found if ROOT in path.parents}
    assert Path("README.md") in read
    assert [str(path) for path in read if not lies_in(path, copied())] == []
