"""The commands ``eval``, ``bench`` and ``anatomy``, which take a model instead of a recipe. Bodies import late."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune.cli.options import (
    Dtype,
    Gpus,
    Json,
    Model,
    console,
    model_source,
    parse_assignments,
    parse_counts,
    task_names,
    use_gpus,
)
from llmprune.common.errors import RecipeError
from llmprune.common.files import require_file, require_folder
from llmprune.common.libraries import import_libraries
from llmprune.common.local_processes import is_first_of_launcher
from llmprune.common.progress import lines_without_terminal

if TYPE_CHECKING:
    from llmprune.recipe.evaluation import Evaluation

_StaticCache = Annotated[
    bool,
    typer.Option("--static-cache", help="Allocate the key-value cache once; on CUDA also compile decoding."),
]


def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")],
    *,
    against: Annotated[str | None, typer.Option(help="Base model to compare with, sample by sample.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of further task files. They may run code: use only those you trust.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of samples per task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=METRIC", help="Metric to compare, such as arc_easy=acc_norm; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per batch.")] = 8,
    backend: Annotated[str | None, typer.Option(help="lm-eval backend, such as vllm, in its own process.")] = None,
    backend_arg: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Argument of the backend; may be repeated.")
    ] = None,
    min_retention: Annotated[
        float | None, typer.Option(help="Gate: exit with 3 unless the interval's lower end reaches it.")
    ] = None,
    devices: Gpus = "all",
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and for finished tasks, to continue from.")
    ] = None,
) -> None:
    """Evaluate a model with lm-eval, alone or against its base."""
    _require(against, "--against", where=min_retention is not None, why="--min-retention compares with a base")
    _require(backend, "--backend", where=bool(backend_arg), why="--backend-arg belongs to a backend")
    settings = _evaluation(
        tasks=task_names(tasks),
        include_path=str(include_path) if include_path else None,
        limit=limit,
        num_fewshot=num_fewshot,
        metrics=parse_assignments("--metric", metric),
        batch_size=batch_size,
        backend={"name": backend, "args": parse_assignments("--backend-arg", backend_arg)} if backend else None,
        gate={"min_retention": min_retention} if min_retention is not None else None,
    )
    judged, base = model_source(model), model_source(against) if against else None
    _require_output(output)
    import_libraries(announced=True)
    from llmprune.cli.eval import evaluate_models
    from llmprune.common.distributed import leave_process_group

    use_gpus(devices)
    with lines_without_terminal():
        evaluate_models(judged, base, settings=settings, output=output, console=console())
    leave_process_group()


def _require_output(output: Path | None) -> None:
    """Raise OutputError, in the first process, where a folder cannot be written."""
    if output is not None and is_first_of_launcher():
        require_folder(output)


def _require(value: str | None, option: str, *, where: bool, why: str) -> None:
    """Raise RecipeError where another option needs this one and it is not given."""
    if where and not value:
        raise RecipeError(f"{why}; name it with {option}")


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder; the folder of a run: its model and its base.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Base model, timed in turn with the model; of a run: that of its report.")
    ] = None,
    *,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Time the model's 2:4 matrices dense and sparse instead, on a CUDA GPU.")
    ] = False,
    batch_sizes: Annotated[str, typer.Option(help="Prompts per batch, separated by commas.")] = "1,8",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "64,512",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each prompt.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model, after a warm-up.")] = 5,
    dtype: Dtype = "auto",
    static_cache: _StaticCache = False,
    devices: Gpus = "all",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the figures as JSON.")] = None,
) -> None:
    """Measure speed and memory of a model against its base, in turn on this machine."""
    batches, lengths = parse_counts("--batch-sizes", batch_sizes), parse_counts("--contexts", contexts)
    of_run = (Path(model) / "report.json").is_file()
    if (sparse and against is not None) or not (sparse or against is not None or of_run):
        raise RecipeError("bench: give a base model with --against, or --sparse to time the model against itself")
    source = model_source(str(Path(model) / "model") if of_run else model, dtype=dtype)
    base = None if against is None else model_source(against, dtype=dtype)
    if output is not None:
        require_file(output, option="--output", example="bench.json")
    import_libraries(announced=True)
    if of_run and base is None and not sparse:
        from llmprune.pipeline.reevaluate import base_of

        base = base_of(Path(model)).model_copy(update={"dtype": source.dtype})
    from llmprune.cli.bench import bench_models, bench_sparse
    from llmprune.common.device_errors import device_errors
    from llmprune.evaluation.bench.speed_and_memory import BenchSettings

    use_gpus(devices)
    settings = BenchSettings(
        tuple(batches), tuple(lengths), new_tokens=new_tokens, repeats=repeats, static_cache=static_cache
    )
    with (
        lines_without_terminal(),
        device_errors("give lower --batch-sizes or --contexts, or use a GPU with more memory"),
    ):
        if base is None:
            bench_sparse(source, settings=settings, output=output, console=console())
        else:
            bench_models(source, base, settings=settings, output=output, console=console())


def anatomy(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hub id, folder (config.json suffices), adapter or GGUF file."),
    ],
    as_json: Json = False,
) -> None:
    """Show what can be pruned in a model, and why the rest cannot."""
    import_libraries(announced=False)
    source = model_source(model)
    from llmprune.anatomy.discovery import discover
    from llmprune.anatomy.hidden_size import find_hidden_size
    from llmprune.checkpoint.loading import load_config
    from llmprune.report.anatomy_table import print_anatomy

    config = load_config(source)
    found = discover(config)
    found = replace(found, hidden=find_hidden_size(config, found))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_anatomy(model, found, console=console())


def _evaluation(**values: Any) -> Evaluation:
    """Return the evaluation settings that the options stand for. Raises RecipeError."""
    from llmprune.recipe.evaluation import Evaluation
    from llmprune.recipe.recipe import validate_arguments

    return validate_arguments(Evaluation, values)
