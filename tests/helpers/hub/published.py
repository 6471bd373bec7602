"""Tiny models and texts on the hub of the tests, and recipes and runs that use them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from helpers.commands import save_model, write_recipe
from helpers.hub.server import Hub
from helpers.hub.state import Repo

ROWS = "".join(json.dumps({"text": f"Paragraph {n}: the fox {n * n} jumps over {n * 7}."}) + "\n" for n in range(100))
CARD = "---\nlicense: apache-2.0\nlanguage: [en, de]\npipeline_tag: text-generation\n---\n# A base model\n"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file of a folder by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish_model(hub: Hub, folder: Path, name: str = "org/base", **settings: Any) -> Repo:
    """Put a tiny model on the hub, with a card, a licence, and files that a run does not use."""
    save_model(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "README.md").write_text(CARD)
    useless = {
        "pytorch_model.bin": b"\x80\x04" * 1000,
        "original/params.json": b"{}",
        "consolidated.safetensors": b"x" * 99,
    }
    return hub.add_repo(name, files_of(folder) | useless, **settings)


def publish_text(hub: Hub, name: str = "org/text") -> Repo:
    """Put a data set of a hundred rows on the hub."""
    return hub.add_repo(name, {"train.jsonl": ROWS.encode()}, "dataset")


def hub_recipe(path: Path, **sections: Any) -> Path:
    """Write a recipe that names model and calibration text by their hub ids."""
    return write_recipe(path, "org/base", "org/text", **sections)


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the charts of the card, which matplotlib draws slowly; the tests of the card draw them."""

    def savefig(figure: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"\x89PNG, and " + figure.axes[0].get_ylabel().encode())

    monkeypatch.setattr(Figure, "savefig", savefig)


def copy_run(done: Path, place: Path) -> Path:
    """Copy a finished run for a test that changes it."""
    return Path(shutil.copytree(done, place))
