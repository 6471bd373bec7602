"""One command, many verbs. Bodies import late: ``--help`` and a wrong recipe answer without torch."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llmprune import __version__
from llmprune.errors import GateNotMet, LLMPruneError, RecipeError
from llmprune.service import verbs as service_verbs

if TYPE_CHECKING:
    from rich.console import Console

    from llmprune.model.source import ModelSource


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which then ends a run as Ctrl-C does."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


class _Verbs(TyperGroup):
    """Says what Ctrl-C and SIGTERM mean; typer itself would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            again = "; run the same command again to continue" if ctx.invoked_subcommand == "run" else ""
            typer.echo(f"llmprune: stopped{again}", err=True)
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None


app = typer.Typer(
    name="llmprune",
    cls=_Verbs,
    help="Prune large language models in depth and width: a recipe in, an ordinary checkpoint with its proof out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more about what is done.")] = False,
) -> None:
    _log_to_stderr(logging.INFO if verbose else logging.WARNING)
    if version:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a recipe would do: sizes, memory, refusals. No weights are read."""
    from llmprune.recipe import Recipe

    parsed = Recipe.load(recipe, overrides or ())
    from llmprune.plan import make_plan
    from llmprune.report.plan_table import print_plan

    made = make_plan(parsed)
    if as_json:
        typer.echo(made.model_dump_json(indent=1))
    else:
        print_plan(made, _console())


@app.command()
def run(
    recipe: RecipePath,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default: runs/NAME-OF-THE-RECIPE.")
    ] = None,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what the folder has and start over.")] = False,
    measure_forward: Annotated[
        bool, typer.Option("--measure-forward", help="Also time a plain forward pass, to compare the passes with.")
    ] = False,
) -> None:
    """Prune a model as a recipe says. Run again on the same folder, it continues."""
    from llmprune.recipe import Recipe

    parsed = Recipe.load(recipe, overrides or ())
    from llmprune.model.processes import is_first, leave
    from llmprune.pipeline import run as run_recipe
    from llmprune.report.table import print_summary

    try:
        report = run_recipe(parsed, output or Path("runs") / recipe.stem, fresh, measure_forward)
    except GateNotMet as missed:
        if is_first():
            print_summary(missed.report, _console())
        raise
    if is_first():
        print_summary(report, _console())
    leave()


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")],
    against: Annotated[str | None, typer.Option(help="Base model to compare with, sample by sample.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further task files. They may run code: trust them first.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples a task.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for evaluation.json.")] = None,
) -> None:
    """Evaluate a model with lm-eval, alone or against its base."""
    from llmprune.evaluation.section import Evaluation
    from llmprune.recipe import validate_arguments

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RecipeError("--tasks names no task; give at least one, such as --tasks hellaswag")
    include = str(include_path) if include_path else None
    settings = validate_arguments(Evaluation, {"tasks": names, "include_path": include, "limit": limit})
    judged, base = _source(model), None if against is None else _source(against)
    from llmprune.comparison import evaluate_models

    evaluate_models(judged, base, settings, output, _console())


@app.command()
def anatomy(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, folder (config.json suffices) or package://MODULE/FILE.gguf."),
    ],
    as_json: Json = False,
) -> None:
    """Show what can be pruned in a model, and why not the rest."""
    source = _source(model)
    from llmprune.anatomy.discovery import discover
    from llmprune.model.loading import load_config
    from llmprune.report.anatomy_table import print_anatomy

    config = load_config(source)
    found = discover(config)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_anatomy(model, config, found, _console())


service_verbs.add_to(app)


def _source(model: str) -> ModelSource:
    from llmprune.model.source import ModelSource
    from llmprune.recipe import validate_arguments

    return validate_arguments(ModelSource, {"id": model})


def _console() -> Console:
    from rich.console import Console

    return Console()


def _log_to_stderr(level: int) -> None:
    """Only llmprune's own log: the libraries' have handlers and settings of their own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("llmprune")
    logger.handlers = [handler]
    logger.setLevel(level)


def main() -> None:
    """Entry point: errors for people become one message and an exit code."""
    try:
        app()
    except LLMPruneError as error:
        typer.echo(f"llmprune: {error}", err=True)
        sys.exit(error.exit_code)
