"""Replace the finished run of a folder: the new run is made beside it, and takes its place once it has a model.

The new run's products lie in ``next.partial`` in the run folder until its model is verified. The swap is two renames
of that folder with the removal of the old products between them, so that a kill at any instant leaves one whole
run: the next start completes a swap that was begun.
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

NEXT = "next.partial"  # products of the run that is to replace the finished one
_READY = "next.ready"  # the same with a verified model: from now on this is the run
_MOVING = "next.moving"  # the same, when the old products are gone
_NAMES_SHOWN = 4

# They say where the model and the text are, not what is in them: fingerprints say that.
_PLACES = ("model.id", "model.revision", "calibration.")


def has_model(home: Path) -> bool:
    """Whether a run folder holds a finished model."""
    return (home / "model" / "config.json").is_file()


def recipe_of_model(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values that decide what the model is, by dotted path; what is measured or pushed does not."""
    hardware = {"model": {"device_map", "max_memory"}, "calibration": {"stream_memory", "stream_disk"}}
    values = recipe.model_dump(mode="json", exclude={"evaluation": True, "hub": True, **hardware})
    return dict(_flat(values, ""))


def refuse_other_recipe(home: Path, recorded: Mapping[str, Any], *, wanted: Mapping[str, Any], places: bool) -> None:
    """Raise OutputError where the folder's model is from another recipe.

    ``places``: whether another place of the model or the text counts too.
    """
    paths = [path for path in {**wanted, **recorded} if recorded.get(path) != wanted.get(path)]
    if not any(places or path == "calibration.batch_size" or not path.startswith(_PLACES) for path in paths):
        return
    listed = [f"{path}: {_said(recorded, path)} there, {_said(wanted, path)} here" for path in paths[:_NAMES_SHOWN]]
    more = f"; and {len(paths) - _NAMES_SHOWN} more" if len(paths) > _NAMES_SHOWN else ""
    raise OutputError(
        f"{home} holds the finished run of another recipe ({'; '.join(listed)}{more}), and this run would replace its "
        f"model {home / 'model'} ({format_size(folder_size(home / 'model'))}); choose another --output to keep both, give "
        "--fresh to replace it once the new model is verified, or delete that model first to cut anew from its scores"
    )


def take_over(home: Path, products: Iterable[str]) -> None:
    """Make the new run the folder's run."""
    with disk_errors(home):
        (home / NEXT).rename(home / _READY)
        fsync(home)
    complete_swap(home, products)


def complete_swap(home: Path, products: Iterable[str]) -> None:
    """Complete a swap that was begun; without one, do nothing."""
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
    """Whether a swap was begun and not completed."""
    return (home / _READY).is_dir() or (home / _MOVING).is_dir()


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
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


def _said(values: Mapping[str, Any], path: str) -> str:
    return short(values[path]) if path in values else "nothing"
