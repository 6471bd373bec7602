"""The command ``recover``: training of a checkpoint that is pruned already, by llmprune or by another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli.options import EndRecovery, Fresh, Overrides
from llmprune.cli.run_commands import run_recipe
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
    settings = [f"model.id={checkpoint}", f"recover.against={against}", "refit=false", "calibration.self_generated=0"]
    settings += [f"{name}=null" for name in _LEFT_OUT]
    settings += [f"recover.tokens={tokens}"] if tokens else []
    settings += [f"recover.hours={hours}"] if hours else []
    if recipe is None:
        settings.append(f"calibration.samples={_SAMPLES}")
        parsed = Recipe.parse("model: {}\n", [*settings, *(overrides or [])], source="arguments")
    else:
        parsed = Recipe.load(recipe, [*settings, *(overrides or [])])
    folder = output or Path("runs") / f"{Path(checkpoint).resolve().name}-recovered"
    run_recipe(context, parsed, folder=folder, fresh=fresh, end_recovery=end_recovery)
