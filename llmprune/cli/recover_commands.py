"""The command ``recover``: training of a checkpoint that is pruned already, by llmprune or by another tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmprune.checkpoint.local_paths import local_folder
from llmprune.cli.options import EndRecovery, Fresh, Overrides
from llmprune.cli.run_commands import run_recipe
from llmprune.common.errors import ModelError, RecipeError
from llmprune.recipe.recipe import Recipe

# Calibration windows only check the checkpoint, with some of each kind of the default mix: recover.data is trained on.
_SAMPLES = 16
# Sections of a recipe that pruned.
_LEFT_OUT = ("budget", "depth", "width", "experts", "hidden", "vocabulary", "sparsity", "hub")


def recover(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub id of the pruned model.", show_default=False)
    ],
    against: Annotated[
        str, typer.Option("--against", metavar="BASE", help="Folder or hub id of the dense model.", show_default=False)
    ],
    *,
    context: typer.Context,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, such as 500K or 20M.")] = None,
    hours: Annotated[float | None, typer.Option(help="Time to train for, in place of tokens.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe with further settings: text, recover, evaluation. Its cuts are left out."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default: runs/NAME-recovered.")
    ] = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    end_recovery: EndRecovery = False,
) -> None:
    """Train a pruned model on the dense model's predictions. Run again on the same folder to continue."""
    is_open = tokens is None and hours is None
    if (tokens is not None and hours is not None) or (is_open and recipe is None and not overrides):
        raise RecipeError("say how long to train: give one of --tokens, such as --tokens 20M, and --hours")
    for name, place in (("CHECKPOINT", checkpoint), ("--against", against)):
        _require_place(name, place)
    settings = [_setting("model.id", checkpoint), _setting("recover.against", against)]
    settings += ["refit=false", "calibration.self_generated=0", *(f"{name}=null" for name in _LEFT_OUT)]
    if tokens is not None:
        settings += [_setting("recover.tokens", tokens), "recover.hours=null"]
    if hours is not None:
        settings += [_setting("recover.hours", hours), "recover.tokens=null"]
    if recipe is None:
        settings.append(f"calibration.samples={_SAMPLES}")
        parsed = Recipe.parse("model: {}\n", [*settings, *(overrides or [])], source="arguments")
    else:
        parsed = Recipe.load(recipe, [*settings, *(overrides or [])])
    folder = output or Path("runs") / f"{Path(checkpoint).resolve().name}-recovered"
    run_recipe(context, parsed, folder=folder, fresh=fresh, end_recovery=end_recovery)


def _setting(key: str, value: object) -> str:
    """Return an override with a value that YAML reads as it is: a folder may be named 123 or null."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _require_place(name: str, place: str) -> None:
    """Check what an argument names, as far as its form and the disk show. Raises RecipeError and ModelError."""
    wanted = "the folder of a checkpoint or a hub id (org/name)"
    if not place.strip():
        raise RecipeError(f"{name} is empty; give {wanted}")
    if place.endswith(".gguf") or "://" in place:
        return
    try:
        local_folder(place, wanted=wanted)
    except ModelError as error:
        raise ModelError(f"{name}: {error}; a recipe belongs to --recipe") from error
