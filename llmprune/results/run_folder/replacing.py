"""Replacement of a finished run in its folder, once the new run has a verified model.

The new run's products are in ``next.partial`` in the run folder until its model is verified. The swap renames that
folder twice and removes the old products in between. A process that is killed at any point leaves one complete run: the
next start completes a swap that was begun.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmprune.common.errors import OutputError
from llmprune.common.files import disk_errors, folder_size, fsync
from llmprune.common.schema import format_size
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.validation_messages import short

NEXT = "next.partial"  # products of the new run
_READY = "next.ready"  # its model is verified: it is the folder's run from now on
_MOVING = "next.moving"  # the old products are removed
_NAMES_SHOWN = 4

# Recipe keys that locate the model and the text. Their contents are compared by fingerprints.
_LOCATIONS = ("model.id", "model.revision", "model.gguf", "model.base", "model.base_revision", "calibration.")
# Keys of the calibration that change the model although the text that is read stays the same.
_TREATMENTS = frozenset(f"calibration.{key}" for key in ("batch_size", "combine", "self_generated", "source_key"))


def has_model(home: Path) -> bool:
    """Check that a run folder holds a finished model."""
    return (home / "model" / "config.json").is_file()


def recipe_of_model(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values that determine the model, by dotted path: no evaluation, exports, hub or hardware."""
    others: dict[str, Any] = {"evaluation": True, "hub": True, "devices": True, "export": {"gguf", "requantize"}}
    hardware = {"model": {"device_map", "max_memory"}, "calibration": {"stream_memory", "stream_disk"}}
    values = recipe.model_dump(mode="json", exclude=others | hardware)
    return dict(_flat(values, ""))


def refuse_other_recipe(home: Path, recorded: Mapping[str, Any], *, wanted: Mapping[str, Any], locations: bool) -> None:
    """Raise OutputError if the folder's model was made by another recipe.

    ``locations``: also refuse another location of the model or the text.
    """
    if is_same_recipe(recorded, wanted, locations=locations):
        return
    paths = _differing(recorded, wanted)
    listed = [
        f"{path}: {_shown(recorded, path)} in the folder, {_shown(wanted, path)} in this recipe"
        for path in paths[:_NAMES_SHOWN]
    ]
    more = f"; and {len(paths) - _NAMES_SHOWN} more" if len(paths) > _NAMES_SHOWN else ""
    raise OutputError(
        f"{home} holds the finished run of another recipe ({'; '.join(listed)}{more}), and this run would replace its "
        f"model {home / 'model'} ({format_size(folder_size(home / 'model'))}); choose another --output to keep both, "
        "give --fresh to replace it once the new model is verified, or delete that model to prune again with its scores"
    )


def is_same_recipe(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, locations: bool) -> bool:
    """Compare two recipes by their values; ``locations``: with the location of the model and the text."""
    return not any(
        locations or path in _TREATMENTS or not path.startswith(_LOCATIONS) for path in _differing(recorded, wanted)
    )


def _differing(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [path for path in {**wanted, **recorded} if recorded.get(path) != wanted.get(path)]


def take_over(home: Path, products: Iterable[str]) -> None:
    """Replace the folder's run by the new run. Raises DiskError if the disk fails."""
    with disk_errors(home):
        (home / NEXT).rename(home / _READY)
        fsync(home)
    complete_swap(home, products)


def complete_swap(home: Path, products: Iterable[str]) -> None:
    """Complete a swap that was begun, if there is one."""
    ready, moving = home / _READY, home / _MOVING
    with disk_errors(home):
        if ready.is_dir():
            for name in products:
                remove(home / name)
            ready.rename(moving)
            fsync(home)
        if moving.is_dir():
            for entry in list(moving.iterdir()):
                entry.rename(home / entry.name)
            moving.rmdir()
            fsync(home)


def is_swapping(home: Path) -> bool:
    """Check that a swap was begun and not completed."""
    return (home / _READY).is_dir() or (home / _MOVING).is_dir()


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{path}.{key}" if path else str(key))


def _shown(values: Mapping[str, Any], path: str) -> str:
    return short(values[path]) if path in values else "nothing"
