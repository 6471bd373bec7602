"""Edit a base model's files, and prune it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.commands import write_recipe
from llmprune import Recipe, Report, run


def add(folder: Path, files: dict[str, str]) -> None:
    """Write text files, by their paths in a folder."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def prune(made: Path, base: Path | str, folder: Path, **sections: Any) -> Report:
    """Run a recipe on a base model; the result is in ``folder``/run/model."""
    folder.mkdir(parents=True, exist_ok=True)
    return run(Recipe.load(write_recipe(folder / "recipe.yaml", base, made / "text.txt", **sections)), folder / "run")


def config_of(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json."""
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return fields
