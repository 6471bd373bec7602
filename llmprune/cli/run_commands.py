"""The commands ``plan``, ``run`` and ``reevaluate``. Bodies import late: a wrong recipe is answered without torch."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmprune.cli.options import (
    CommandLine,
    EndRecovery,
    FinishedFolder,
    Fresh,
    Json,
    Overrides,
    RecipePlace,
    RunFolderOption,
    console,
    task_names,
)
from llmprune.common.errors import RecipeError
from llmprune.common.libraries import import_libraries, seconds_of_imports
from llmprune.common.printing import printable
from llmprune.common.progress import lines_without_terminal
from llmprune.results.run_folder.output_path import require_run_folder

if TYPE_CHECKING:
    from llmprune.pipeline.finish import FinishedRun
    from llmprune.pipeline.options import RunOptions
    from llmprune.publish.provenance import Record
    from llmprune.recipe.recipe import Recipe
    from llmprune.results.report_schema import Report

logger = logging.getLogger(__name__)

_MeasureForward = Annotated[
    bool,
    typer.Option("--measure-forward", help="Also time plain forward passes, before and after, for comparison."),
]
_CalibrationCheck = Annotated[
    bool,
    typer.Option(
        "--calibration-check",
        help="Repeat the choice on each source of the calibration text, or on each half of a single one, and report "
        "how far they agree.",
    ),
]
_ScoresOf = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Folder of a run of another size: its scores are reused, where model, text and criteria are the same.",
    ),
]


def plan(recipe: RecipePlace, overrides: Overrides = None, *, as_json: Json = False) -> None:
    """Show what a recipe would do: sizes, memory, time, and everything that a run would refuse. Reads no weights."""
    parsed, _ = load_recipe(recipe, overrides)
    import_libraries(announced=False)
    from llmprune.common.device_errors import device_errors
    from llmprune.planning.plan import plan_and_check
    from llmprune.planning.timing import with_durations
    from llmprune.report.plan_table import print_plan

    loading = seconds_of_imports()
    with device_errors():
        processes = _processes_to_start(parsed)
        found = plan_and_check(parsed, starts=processes)
        timed = found.plan and with_durations(found.plan, processes=processes, loading=loading)
    if timed is not None:  # sizes are useful even where text or tokenizer are missing
        if as_json:
            typer.echo(json.dumps(timed.model_dump(mode="json"), indent=1))
        else:
            print_plan(timed, console())
    found.require(recipe)


def run(
    recipe: RecipePlace,
    output: RunFolderOption = None,
    *,
    context: typer.Context,
    overrides: Overrides = None,
    fresh: Fresh = False,
    measure_forward: _MeasureForward = False,
    calibration_check: _CalibrationCheck = False,
    end_recovery: EndRecovery = False,
    scores_of: _ScoresOf = None,
) -> None:
    """Prune a model as a recipe says. Run again on the same folder to continue."""
    if scores_of is not None and fresh:
        raise RecipeError("--fresh makes everything anew, and --scores-of reuses scores; give one of the two")
    parsed, record = load_recipe(recipe, overrides)
    folder = output or default_folder(recipe)
    require_run_folder(folder)
    import_libraries(announced=True)
    if context.obj is not None and run_on_every_gpu(context.obj, parsed, halves=calibration_check):
        return
    from llmprune.common.distributed import is_first_process, leave_process_group
    from llmprune.pipeline.options import RunOptions
    from llmprune.publish.generated_windows import fetch_all_generated
    from llmprune.publish.reproduce import recorded_search

    options = RunOptions(
        fresh=fresh,
        measure_forward=measure_forward,
        calibration_check=calibration_check,
        end_recovery=end_recovery,
        generated={} if record is None else fetch_all_generated(recipe, record),
        searched=None if record is None else recorded_search(record, parsed),
        scores_of=scores_of,
    )
    report = _run_here(parsed, folder, options=options)
    if record is not None and is_first_process():
        _print_repeated(recipe, record, report=report, folder=folder)
    leave_process_group()


def run_recipe(context: typer.Context, recipe: Recipe, *, folder: Path, fresh: bool, end_recovery: bool) -> None:
    """Run a recipe that a command has composed, in a process for each chosen GPU."""
    require_run_folder(folder)
    import_libraries(announced=True)
    if context.obj is not None and run_on_every_gpu(context.obj, recipe, halves=False):
        return
    from llmprune.common.distributed import leave_process_group
    from llmprune.pipeline.options import RunOptions

    _run_here(recipe, folder, options=RunOptions(fresh=fresh, end_recovery=end_recovery))
    leave_process_group()


def _run_here(recipe: Recipe, folder: Path, *, options: RunOptions) -> Report:
    """Run a recipe in this process, and show its report. Raises GateNotMet."""
    from llmprune.pipeline.run import run_to_report

    with lines_without_terminal():
        finished = run_to_report(recipe, folder, options=options)
    return _show_and_require_gate(finished)


def _processes_to_start(recipe: Recipe) -> int:
    """Return the number of processes that a run would start here, and leave only its GPUs visible to this process.

    Where a GPU of the recipe is absent, which the plan reports, it is 1.
    """
    from llmprune.common.devices import use_gpus
    from llmprune.common.distributed import has_launcher
    from llmprune.planning.devices import count_processes

    if has_launcher():
        return 1
    try:
        count, note = count_processes(recipe, halves=False)
        use_gpus(recipe.devices)
    except RecipeError:
        return 1
    if note:
        logger.warning(note)
    return count


def run_on_every_gpu(command: CommandLine, recipe: Recipe, *, halves: bool) -> bool:
    """Run the command in a process for each chosen GPU; return False where this process does the work itself.

    Then only the chosen GPUs are visible to it. Raises typer.Exit with the processes' exit code, and RecipeError for
    absent GPUs.
    """
    from llmprune.common.devices import choose_gpus, use_gpus, visibility
    from llmprune.common.distributed import has_launcher
    from llmprune.common.local_processes import run_processes
    from llmprune.planning.devices import count_processes

    if has_launcher():
        return False
    count, note = count_processes(recipe, halves=halves)
    if note:
        logger.warning(note)
    gpus = choose_gpus(recipe.devices)
    if count == 1:
        use_gpus(recipe.devices)
        return False
    code = run_processes(command.words, count, environment=visibility(gpus[:count]))
    if code:
        raise typer.Exit(code)
    return True


def reevaluate(
    run: FinishedFolder,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples per task; default: as many as the gate needs for a decision. With --tasks: of each of these.",
        ),
    ] = None,
    *,
    tasks: Annotated[
        str | None, typer.Option(help="Further lm-eval tasks, separated by commas, in place of more samples.")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder with files of these tasks. They may run code: use only those you trust."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the new report, which shares the model's files; default: RUN itself."
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model, where it is not where it was when the run was made.")
    ] = None,
) -> None:
    """Evaluate more samples or tasks of a finished run's model: nothing is pruned, and earlier answers are kept."""
    names = task_names(tasks) if tasks is not None else []
    if include_path is not None and not names:
        raise RecipeError("--include-path belongs to further tasks; name them with --tasks")
    if output is not None:
        require_run_folder(output)
    import_libraries(announced=True)
    from llmprune.cli.eval import errors_with_option_names
    from llmprune.common.distributed import leave_process_group
    from llmprune.pipeline.reevaluate import reevaluate as evaluate_again

    with lines_without_terminal(), errors_with_option_names() if names else nullcontext():
        finished = evaluate_again(run, limit, tasks=names, include_path=include_path, output=output, base=base)
    _show_and_require_gate(finished)
    leave_process_group()


def _show_and_require_gate(finished: FinishedRun) -> Report:
    """Print the summary of a run, or of all members of a family, and return its report. Raises GateNotMet."""
    from llmprune.common.distributed import is_first_process
    from llmprune.report.family_table import print_family
    from llmprune.report.run_table import print_summary

    if is_first_process():
        if finished.family:
            print_family(finished.family, console())
        else:
            print_summary(finished.report, console())
    return finished.require_gate()


def default_folder(place: str) -> Path:
    """Return the run folder of a recipe: ``runs`` with the name of its file, or of the model on the hub."""
    return Path("runs") / (place.split("@")[0].rsplit("/")[-1] if place.startswith("hub://") else Path(place).stem)


def load_recipe(place: str, overrides: list[str] | None) -> tuple[Recipe, Record | None]:
    """Return the recipe of a file, or that of a model on the hub together with the model's record."""
    from llmprune.recipe.recipe import Recipe

    if not place.startswith("hub://"):
        reading = Recipe.read_file(place, overrides or ())
        if reading.problems and reading.recipe is not None:
            import_libraries(announced=False)
            from llmprune.planning.plan import plan_and_check

            plan_and_check(reading.recipe, wrong=reading.wrong, problems=reading.problems).require(place)
        if reading.recipe is None:
            raise RecipeError(reading.problems, place)
        return reading.recipe, None
    import_libraries(announced=False)
    from llmprune.publish.reproduce import recorded_recipe

    return recorded_recipe(place, overrides or ())


def _print_repeated(place: str, record: Record, *, report: Report, folder: Path) -> None:
    """Print whether a repeated run gave the recorded weights, and every difference from the record."""
    from llmprune.publish.reproduce import differences

    found = differences(record, report, model=folder / "model")
    if not found:
        typer.echo(f"\nrepeated: the weights equal those of {place} to the bit")
    for difference in found:
        typer.echo(f"llmprune: not as recorded in {place}: {printable(difference)}", err=True)
