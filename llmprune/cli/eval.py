"""``llmprune eval``: lm-eval tasks on one model, or on two sample by sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.checkpoint.loading import load_model, load_tokenizer
from llmprune.common.distributed import is_first_process, synchronized
from llmprune.common.errors import EvaluationError, GateNotMet, OutputError, RecipeError
from llmprune.common.files import write_text
from llmprune.common.progress import quiet_libraries
from llmprune.common.versions import versions
from llmprune.evaluation.gate import judge
from llmprune.evaluation.lm_eval.harness import Subject, ask, subject
from llmprune.evaluation.lm_eval.tasks import check_tasks, fetch_tasks
from llmprune.evaluation.lm_eval.tokenizers import require_same_tokenizer
from llmprune.evaluation.retention import CONFIDENCE, compare
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.model import ModelSource
from llmprune.report.task_table import table_of_one, table_of_two
from llmprune.results.formatting import describe_verdict

_OPTIONS = {
    "evaluation.tasks": "--tasks",
    "evaluation.include_path": "--include-path",
    "evaluation.metrics": "--metric",
    "evaluation.backend": "--backend",
    "evaluation.gate": "--min-retention",
    "evaluation.limit": "--limit",
}


def evaluate_models(
    model: ModelSource, against: ModelSource | None, *, settings: Evaluation, output: Path | None, console: Console
) -> None:
    """Evaluate, print a table, and write ``evaluation.json`` where a folder is given.

    What is wrong with the tasks, either model or the folder is raised before weights are read. Finished tasks are
    kept in that folder, and those of the base in the user's cache: an interrupted evaluation continues.
    Under a launcher the processes share the samples, and an error of one ends all.
    """
    quiet_libraries()
    with synchronized():
        _evaluate(model, against, settings=settings, output=output, console=console)


def _evaluate(
    model: ModelSource, against: ModelSource | None, *, settings: Evaluation, output: Path | None, console: Console
) -> None:
    if output is not None and output.exists() and not output.is_dir():
        raise OutputError(f"the output {output} is a file; give a folder")
    with _as_options():
        check_tasks(settings)
    judged = _subject(model, output)
    base = _subject(against) if against is not None else None
    if against is not None and base is not None:
        require_same_tokenizer(against.id, base.tokenizer, model=model.id, other=judged.tokenizer)
    if output is not None:
        _make_folder(output)
    with _as_options():
        fetch_tasks(settings)
        results = ask(judged, "pruned", evaluation=settings)
    found: dict[str, Any] = {
        "model": model.id,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "results": results.model_dump(mode="json"),
    }
    gate = None
    if against is None or base is None:
        table = table_of_one(results)
    else:
        whole = ask(base, "dense", evaluation=settings)
        figures = compare(whole, results, confidence=settings.gate.confidence if settings.gate else CONFIDENCE)
        gate = judge(settings.gate, figures)
        table = table_of_two(figures.tasks, figures.groups, mean=figures.mean)
        found |= {
            "against": against.id,
            "against_results": whole.model_dump(mode="json"),
            "tasks": [task.model_dump(mode="json") for task in figures.tasks],
            "groups": [group.model_dump(mode="json") for group in figures.groups],
            "retention": figures.mean.model_dump(mode="json") if figures.mean else None,
            "gate": gate.model_dump(mode="json") if gate else None,
        }
    if is_first_process():
        _show(table, found, output=output, console=console)
    if gate and not gate.passed:
        raise GateNotMet(_in_options(describe_verdict(gate)))


def _show(table: Table, found: dict[str, Any], *, output: Path | None, console: Console) -> None:
    console.print(table)
    if output is not None:
        write_text(output / "evaluation.json", json.dumps(found, indent=1) + "\n")
        console.print(Text(f"written to {output / 'evaluation.json'}"), soft_wrap=True)


def _subject(source: ModelSource, output: Path | None = None) -> Subject:
    """A model by its name; its weights are read when the first task needs them."""
    tokenizer = load_tokenizer(source)
    return subject(source, tokenizer, load=lambda: load_model(source), folder=output / "tasks" if output else None)


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors about tasks, with a recipe's keys as the options that they are here."""
    try:
        yield
    except (RecipeError, EvaluationError) as error:
        raise type(error)(_in_options(str(error))) from error


def _in_options(said: str) -> str:
    for key, option in _OPTIONS.items():
        said = said.replace(key, option)
    return said


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the output folder {output} cannot be made: {error}; choose another --output") from error
