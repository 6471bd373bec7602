"""Options and arguments that several commands share, and the values that they stand for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune.common.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from llmprune.recipe.model import ModelSource

RecipePlace = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or hub://ORG/NAME@REVISION: the recipe of a pushed model.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Gpus = Annotated[
    str,
    typer.Option("--devices", help="GPUs to use: all, a number of them, or their indices, such as 0,2 or [0]."),
]
RunFolderOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; default: runs/NAME-OF-THE-RECIPE.")
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over; a finished model in the folder is kept until the new one is verified."),
]
EndRecovery = Annotated[
    bool,
    typer.Option(
        "--end-recovery",
        help="Train no more: take the best weights of the training that was stopped, and go on with them.",
    ),
]
Dtype = Annotated[str, typer.Option(help="Arithmetic: auto, float32, bfloat16 or float16.")]
FinishedFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder.")]


@dataclass(frozen=True)
class CommandLine:
    """The command line that started this process, for processes that share its work.

    A command has none where another program calls it.
    """

    words: tuple[str, ...]


def console() -> Console:
    """Return the console for tables on standard output."""
    from llmprune.common.console import PlainConsole

    return PlainConsole()


def model_source(model: str, **settings: str) -> ModelSource:
    """Return the source of a model that an argument names. Raises RecipeError."""
    from llmprune.recipe.model import ModelSource
    from llmprune.recipe.recipe import validate_arguments

    return validate_arguments(ModelSource, {"id": model, **settings})


def parse_assignments(option: str, texts: list[str] | None) -> dict[str, Any]:
    """Parse ``NAME=VALUE`` texts; numbers and truth values are read as in YAML. Raises RecipeError."""
    from llmprune.recipe.yaml_reader import read_value

    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise RecipeError(f"{option} {text!r}: the form is NAME=VALUE")
        found[name.strip()] = read_value(value)
    return found


def use_gpus(text: str) -> None:
    """Leave only the GPUs that ``--devices`` names visible to this process. Raises RecipeError."""
    from pydantic import TypeAdapter, ValidationError

    from llmprune.common import devices
    from llmprune.recipe.devices import DeviceChoice
    from llmprune.recipe.yaml_reader import read_value

    value = read_value(f"[{text}]" if "," in text and "[" not in text else text)
    try:
        chosen = TypeAdapter(DeviceChoice).validate_python(value, strict=True)
    except ValidationError as error:
        raise RecipeError(
            f"--devices {text!r}: give all, a number of GPUs above 0, or their indices, such as 0,2 or [0]"
        ) from error
    devices.use_gpus(chosen)


def task_names(text: str) -> list[str]:
    """Parse the names of ``--tasks``, separated by commas. Raises RecipeError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RecipeError("--tasks names no task; give at least one, such as --tasks hellaswag")
    return names


def parse_counts(option: str, text: str) -> list[int]:
    """Parse whole numbers above 0, separated by commas, and sort them. Raises RecipeError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise RecipeError(f"{option} {text!r}: give whole numbers above 0, separated by commas, such as 1,8")
    return sorted({int(part) for part in parts})
