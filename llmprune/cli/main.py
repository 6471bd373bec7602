"""One command, many verbs. Bodies import late: ``--help`` and a wrong recipe answer without torch."""

from __future__ import annotations

import copy
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
from llmprune.common.errors import GateNotMet, LLMPruneError, RecipeError, to_continue
from llmprune.common.hub.client import guard_logs, redact
from llmprune.common.printing import print_lines, printable, printable_message
from llmprune.common.progress import lines_without_terminal, say_loading
from llmprune.service.cli import commands as service_verbs

if TYPE_CHECKING:
    from rich.console import Console

    from llmprune.publish.provenance import Record
    from llmprune.recipe.model import ModelSource
    from llmprune.recipe.recipe import Recipe
    from llmprune.results.schema import Report


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which then ends a run as Ctrl-C does."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


class _Verbs(TyperGroup):
    """Says what Ctrl-C and SIGTERM mean, where typer ends without a word; takes ``-v`` behind a verb too."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a verb that has the option ``-v`` as well."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and not any(option.name == "verbose" for option in command.params):
            option: Any = copy.copy(next(option for option in self.params if option.name == "verbose"))
            option.expose_value, option.hidden = False, True
            option.callback = lambda _context, _option, wished: _log_to_stderr(logging.INFO) if wished else None
            command.params.append(option)
        return command

    def invoke(self, ctx: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            again = f"; {to_continue()}" if ctx.invoked_subcommand == "run" else ""
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

RecipePlace = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file; or hub://ORG/NAME@REVISION, a model that was pushed.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more; also after a verb.")] = False,
) -> None:
    _log_to_stderr(logging.INFO if verbose else logging.WARNING)
    if version:
        typer.echo(f"llmprune {__version__}")
        raise typer.Exit


@app.command()
def plan(recipe: RecipePlace, overrides: Overrides = None, *, as_json: Json = False) -> None:
    """Say what a recipe would do: sizes, memory, and all that a run would refuse. No weights are read."""
    parsed, _ = _recipe(recipe, overrides)
    say_loading(always=False)
    from llmprune.planning.plan import plan_and_check
    from llmprune.report.plan_table import print_plan

    found = plan_and_check(parsed)
    if found.plan is not None and as_json:  # sizes are worth seeing also where text or tokenizer are not there
        typer.echo(json.dumps(found.plan.model_dump(mode="json"), indent=1))
    elif found.plan is not None:
        print_plan(found.plan, _console())
    found.require(recipe)


@app.command()
def run(
    recipe: RecipePlace,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default: runs/NAME-OF-THE-RECIPE.")
    ] = None,
    *,
    overrides: Overrides = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start over; a finished model in the folder stays until the new one is verified."),
    ] = False,
    measure_forward: Annotated[
        bool,
        typer.Option("--measure-forward", help="Also time plain forward passes, before and after, to compare with."),
    ] = False,
    calibration_check: Annotated[
        bool,
        typer.Option("--calibration-check", help="Also choose by each half of the calibration, and compare."),
    ] = False,
) -> None:
    """Prune a model as a recipe says. Run again on the same folder, it continues."""
    parsed, record = _recipe(recipe, overrides)
    folder = output or Path("runs") / (Path(recipe).stem if record is None else recipe.split("@")[0].rsplit("/")[-1])
    say_loading(always=True)
    from llmprune.common.distributed import is_first, leave
    from llmprune.pipeline.run import run as run_recipe
    from llmprune.report.run_table import print_summary

    try:
        with lines_without_terminal():
            report = run_recipe(
                parsed, folder, fresh=fresh, measure_forward=measure_forward, calibration_check=calibration_check
            )
    except GateNotMet as missed:
        if is_first() and missed.report is not None:
            print_summary(missed.report, _console())
        raise
    if is_first():
        print_summary(report, _console())
        if record is not None:
            _print_repeated(recipe, record, report=report, folder=folder)
    leave()


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    repo_id: Annotated[
        str | None, typer.Option(help="Repository, such as org/name; default: that of the recipe's hub section.")
    ] = None,
    *,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository; default: private.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch that gets the commit; default: main.")] = None,
    create_pr: Annotated[
        bool | None, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = None,
    when: Annotated[
        str | None, typer.Option(help="always: also where the gate was not met, and the card says so.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file that gets repository, commit and address.")] = None,
) -> None:
    """Push the model of a finished run to the hub, with its card and provenance."""
    settings = {"repo_id": repo_id, "private": private, "branch": branch, "create_pr": create_pr}
    say_loading(always=False)
    from llmprune.common.files import require_file, write_text
    from llmprune.publish.push import push_run

    if save:
        require_file(save, option="--save", example="published.json")
    published = push_run(run, settings | {"when": when, "commit_message": commit_message})
    if save:
        write_text(save, published.model_dump_json(indent=1) + "\n")
    typer.echo(f"pushed {published.files} files to {published.repo_id}\n{printable(published.url)}")


@app.command()
def inspect(
    place: Annotated[str, typer.Argument(metavar="MODEL", help="ORG/NAME, ORG/NAME@REVISION, or a folder.")],
    as_json: Json = False,
) -> None:
    """Print what a pushed model came from, and check its files against it."""
    say_loading(always=False)
    from llmprune.publish.provenance import differing_files, fetch_record, parse_place
    from llmprune.publish.show import print_record

    record, commit = fetch_record(place)
    if as_json:
        typer.echo(json.dumps(record.model_dump(mode="json"), indent=1))
    else:
        differing = differing_files(parse_place(place)[0], commit, record=record) if commit else None
        print_record(place, commit, record=record, differing=differing, console=_console())


@app.command()
def reevaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples a task; default: as many as the gate needs to be decided.")
    ] = None,
) -> None:
    """Evaluate more samples of a finished run's model: no pruning again, and earlier answers are kept."""
    say_loading(always=True)
    from llmprune.common.distributed import is_first, leave
    from llmprune.pipeline.reevaluate import reevaluate as evaluate_more
    from llmprune.report.run_table import print_summary

    try:
        with lines_without_terminal():
            report = evaluate_more(run, limit)
    except GateNotMet as missed:
        if is_first() and missed.report is not None:
            print_summary(missed.report, _console())
        raise
    if is_first():
        print_summary(report, _console())
    leave()


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder.")],
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")],
    *,
    against: Annotated[str | None, typer.Option(help="Base model to compare with, sample by sample.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further task files. They may run code: trust them first.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most samples a task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=METRIC", help="What is compared, such as arc_easy=acc_norm; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that go through the model together.")] = 8,
    backend: Annotated[str | None, typer.Option(help="lm-eval backend, such as vllm, in its own process.")] = None,
    backend_arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the backend; may be repeated.")
    ] = None,
    min_retention: Annotated[
        float | None, typer.Option(help="Gate: exit with 3 unless the interval's lower end reaches it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json, and for finished tasks to continue from.")
    ] = None,
) -> None:
    """Evaluate a model with lm-eval, alone or against its base."""
    from llmprune.recipe.evaluation import Evaluation
    from llmprune.recipe.recipe import validate_arguments

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RecipeError("--tasks names no task; give at least one, such as --tasks hellaswag")
    if min_retention is not None and against is None:
        raise RecipeError("--min-retention compares with a base; name it with --against")
    if backend_arg and not backend:
        raise RecipeError("--backend-arg belongs to a backend; name it with --backend")
    wishes: dict[str, Any] = {
        "tasks": names,
        "include_path": str(include_path) if include_path else None,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "metrics": _assignments("--metric", metric),
        "batch_size": batch_size,
        "backend": {"name": backend, "args": _assignments("--backend-arg", backend_arg)} if backend else None,
        "gate": {"min_retention": min_retention} if min_retention is not None else None,
    }
    settings = validate_arguments(Evaluation, wishes)
    judged, base = _source(model), None if against is None else _source(against)
    say_loading(always=True)
    from llmprune.cli.eval import evaluate_models
    from llmprune.common.distributed import leave

    with lines_without_terminal():
        evaluate_models(judged, base, settings=settings, output=output, console=_console())
    leave()


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder.")],
    against: Annotated[str | None, typer.Option(help="Base model, timed in turn with it.")] = None,
    *,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Time its 2:4 matrices dense and sparse instead, on a CUDA GPU.")
    ] = False,
    batch_sizes: Annotated[str, typer.Option(help="Prompts at once, separated by commas.")] = "1,8",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "64,512",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model, after a warm-up.")] = 5,
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto, float32, bfloat16 or float16.")] = "auto",
    static_cache: Annotated[
        bool, typer.Option("--static-cache", help="Keys and values in place; on CUDA also compiled decoding.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the figures as JSON.")] = None,
) -> None:
    """Measure speed and memory of a model against its base, on this machine, in turn."""
    batches, lengths = _counts("--batch-sizes", batch_sizes), _counts("--contexts", contexts)
    if (against is None) != sparse:
        raise RecipeError("bench: give a base model with --against, or --sparse to time the model against itself")
    source = _source(model, dtype=dtype)
    base = None if against is None else _source(against, dtype=dtype)
    say_loading(always=True)
    from llmprune.cli.bench import bench_models, bench_sparse

    with lines_without_terminal():
        if base is None:
            bench_sparse(
                source,
                batches,
                contexts=lengths,
                new_tokens=new_tokens,
                repeats=repeats,
                output=output,
                console=_console(),
            )
        else:
            bench_models(
                source,
                base,
                batch_sizes=batches,
                contexts=lengths,
                new_tokens=new_tokens,
                repeats=repeats,
                static_cache=static_cache,
                output=output,
                console=_console(),
            )


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or its report.json.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes; default: report.html in the folder.")
    ] = None,
) -> None:
    """Build a run's page again from its report.json, and print its table."""
    from llmprune.common.files import require_file, write_text
    from llmprune.report.html.page import render_page
    from llmprune.report.run_table import print_summary
    from llmprune.report.runs import load_report

    found = load_report(run_folder)
    page = output or (run_folder if run_folder.is_dir() else run_folder.parent) / "report.html"
    require_file(page, option="--output", example="report.html")
    write_text(page, render_page(found))
    print_summary(found, _console())
    typer.echo(f"written to {page}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs; others are named and left out.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for a page that plots size against retention.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Put several runs beside one another: size, retention, perplexity, speed."""
    from llmprune.common.files import require_file, write_text
    from llmprune.report.html.compare_page import figures_of, render_comparison
    from llmprune.report.runs import load_runs, print_runs

    if output is not None:
        require_file(output, option="--output", example="compare.html")
    found, skipped = load_runs(runs)
    for reason in skipped:
        typer.echo(f"llmprune: left out: {printable(reason)}", err=True)
    if as_json:
        typer.echo(json.dumps(figures_of(found), indent=1))
    else:
        print_runs(found, _console())
    if output is not None:
        write_text(output, render_comparison(found))
        typer.echo(f"written to {output}", err=as_json)


@app.command()
def anatomy(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, folder (config.json suffices) or package://MODULE/FILE.gguf."),
    ],
    as_json: Json = False,
) -> None:
    """Show what can be pruned in a model, and why not the rest."""
    say_loading(always=False)
    source = _source(model)
    from llmprune.anatomy.discovery import discover
    from llmprune.checkpoint.loading import load_config
    from llmprune.report.anatomy_table import print_anatomy

    found = discover(load_config(source))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_anatomy(model, found, console=_console())


service_verbs.add_to(app)


def _recipe(place: str, overrides: list[str] | None) -> tuple[Recipe, Record | None]:
    """The recipe of a file, or of a model on the hub with the record that it is from."""
    from llmprune.recipe.recipe import Recipe

    if not place.startswith("hub://"):
        reading = Recipe.read_file(place, overrides or ())
        if reading.problems and reading.recipe is not None:
            say_loading(always=False)
            from llmprune.planning.plan import plan_and_check

            plan_and_check(reading.recipe, wrong=reading.wrong, problems=reading.problems).require(place)
        if reading.recipe is None:
            raise RecipeError(reading.problems, place)
        return reading.recipe, None
    say_loading(always=False)
    from llmprune.publish.reproduce import recorded_recipe

    return recorded_recipe(place, overrides or ())


def _print_repeated(place: str, record: Record, *, report: Report, folder: Path) -> None:
    from llmprune.publish.reproduce import differences

    found = differences(record, report, model=folder / "model")
    if not found:
        typer.echo(f"\nrepeated: the weights equal those of {place} to the bit")
    for difference in found:
        typer.echo(f"llmprune: not as recorded in {place}: {printable(difference)}", err=True)


def _source(model: str, **more: str) -> ModelSource:
    from llmprune.recipe.model import ModelSource
    from llmprune.recipe.recipe import validate_arguments

    return validate_arguments(ModelSource, {"id": model, **more})


def _assignments(option: str, texts: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` texts as a mapping; numbers and truth values as YAML reads them."""
    from llmprune.recipe.yaml_reader import read_value

    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise RecipeError(f"{option} {text!r}: the form is NAME=VALUE")
        found[name.strip()] = read_value(value)
    return found


def _counts(option: str, text: str) -> list[int]:
    """Whole numbers above 0, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise RecipeError(f"{option} {text!r}: give whole numbers above 0, separated by commas, such as 1,8")
    return sorted({int(part) for part in parts})


def _console() -> Console:
    from llmprune.common.console import PlainConsole

    return PlainConsole()


def _log_to_stderr(level: int) -> None:
    """Only llmprune's own log: the libraries' have handlers and settings of their own."""
    logger = logging.getLogger("llmprune")
    logger.handlers = [logging.StreamHandler()]
    print_lines(logger)
    guard_logs()
    logger.setLevel(level)


def main() -> None:
    """Entry point: errors for people become one message and an exit code."""
    try:
        app()
    except LLMPruneError as error:
        typer.echo(f"llmprune: {printable_message(redact(str(error)))}", err=True)
        sys.exit(error.exit_code)
