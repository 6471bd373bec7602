"""``llmprune eval``: lm-eval tasks on one model, or on two sample by sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.errors import EvaluationError, OutputError, RecipeError
from llmprune.evaluation.harness import TaskResults, check_tasks, fetch_tasks, run_tasks
from llmprune.evaluation.retention import compare, mean_retention
from llmprune.evaluation.section import Evaluation
from llmprune.files import write_text
from llmprune.model.loading import load_config, load_model, load_tokenizer
from llmprune.model.source import ModelSource
from llmprune.progress import quiet_libraries
from llmprune.report.compose import versions
from llmprune.report.value import TaskFigures


def evaluate_models(
    model: ModelSource, against: ModelSource | None, settings: Evaluation, output: Path | None, console: Console
) -> None:
    """Evaluate, print a table, and write ``evaluation.json`` where a folder is given.

    What is wrong with the tasks, either model or the folder is raised before weights are read.
    """
    quiet_libraries()
    if output is not None and output.exists() and not output.is_dir():
        raise OutputError(f"the output {output} is a file; give a folder")
    with _as_options():
        check_tasks(settings)
    sources = [source for source in (model, against) if source is not None]
    for source in sources:
        load_config(source)
        load_tokenizer(source)
    if output is not None:
        _make_folder(output)
    with _as_options():
        fetch_tasks(settings)
    results, *others = [run_tasks(load_model(source), load_tokenizer(source), settings) for source in sources]
    found: dict[str, Any] = {
        "model": model.id,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "results": results.model_dump(mode="json"),
    }
    if against is None:
        console.print(_table_of_one(results))
    else:
        (base,) = others
        figures = compare(base, results)
        retention = mean_retention(figures)
        console.print(_table_of_two(figures, retention))
        found |= {
            "against": against.id,
            "against_results": base.model_dump(mode="json"),
            "tasks": [task.model_dump(mode="json") for task in figures],
            "mean_retention": retention,
        }
    if output is not None:
        write_text(output / "evaluation.json", json.dumps(found, indent=1) + "\n")
        console.print(Text(f"written to {output / 'evaluation.json'}"), soft_wrap=True)


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors about tasks, with a recipe's keys as the options that they are here."""
    try:
        yield
    except (RecipeError, EvaluationError) as error:
        said = str(error).replace("evaluation.tasks", "--tasks").replace("evaluation.include_path", "--include-path")
        raise type(error)(said) from error


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the output folder {output} cannot be made: {error}; choose another --output") from error


def _table_of_one(results: TaskResults) -> Table:
    table = _table("task", "metric", "value", "samples")
    for task in results.tasks:
        table.add_row(task.task, task.metric, f"{task.value:.4f}", str(len(task.samples)))
    return table


def _table_of_two(figures: tuple[TaskFigures, ...], retention: float | None) -> Table:
    table = _table("task", "metric", "base", "model", "retention", "samples", "lost", "gained")
    for task in figures:
        kept = "–" if task.retention is None else f"{task.retention:.2%}"
        flips = ["–" if flip is None else str(flip) for flip in (task.lost, task.gained)]
        values = [f"{task.dense:.4f}", f"{task.pruned:.4f}", kept, str(task.samples)]
        table.add_row(task.task, task.metric, *values, *flips)
    if retention is not None:
        table.add_row("mean", "", "", "", f"{retention:.2%}", "", "", "", style="bold")
    return table


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right", overflow="fold")
    return table
