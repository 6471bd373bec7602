"""``llmprune eval``: lm-eval tasks on one model, or on two sample by sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llmprune.evaluation.harness import TaskResults, check_tasks, run_tasks
from llmprune.evaluation.retention import compare, mean_retention
from llmprune.evaluation.section import Evaluation
from llmprune.files import write_text
from llmprune.model.loading import load_model, load_tokenizer
from llmprune.model.source import ModelSource
from llmprune.progress import quiet_libraries
from llmprune.report.compose import versions
from llmprune.report.value import TaskFigures


def evaluate_models(
    model: str, against: str | None, settings: Evaluation, output: Path | None, console: Console
) -> None:
    """Evaluate, print a table, and write ``evaluation.json`` where a folder is given."""
    quiet_libraries()
    check_tasks(settings)
    results = _evaluate(model, settings)
    found: dict[str, Any] = {
        "model": model,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    found["results"] = results.model_dump(mode="json")
    if against is None:
        console.print(_table_of_one(results))
    else:
        base = _evaluate(against, settings)
        figures = compare(base, results)
        retention = mean_retention(figures)
        console.print(_table_of_two(figures, retention))
        found |= {
            "against": against,
            "against_results": base.model_dump(mode="json"),
            "tasks": [task.model_dump(mode="json") for task in figures],
            "mean_retention": retention,
        }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "evaluation.json", json.dumps(found, indent=1) + "\n")
        console.print(f"written to {output / 'evaluation.json'}")


def _evaluate(model: str, settings: Evaluation) -> TaskResults:
    source = ModelSource(id=model)
    return run_tasks(load_model(source), load_tokenizer(source), settings)


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
        table.add_column(head, justify="left" if number < 2 else "right")
    return table
