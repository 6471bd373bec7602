"""Evaluation for ``llmprune eval``: lm-eval tasks on one model, or on two compared sample by sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmprune.checkpoint.loading import load_tokenizer
from llmprune.common.distributed import is_first_process, synchronized
from llmprune.common.errors import EvaluationError, GateNotMet, OutputError, RecipeError
from llmprune.common.files import write_text
from llmprune.common.libraries import quiet_libraries
from llmprune.common.versions import versions
from llmprune.evaluation.gate import judge
from llmprune.evaluation.lm_eval.harness import EvaluatedModel, evaluate_tasks, evaluated_model
from llmprune.evaluation.lm_eval.tasks import check_tasks, fetch_tasks
from llmprune.evaluation.lm_eval.tokenizers import require_same_tokenizer
from llmprune.evaluation.retention import CONFIDENCE, compare
from llmprune.recipe.evaluation import Evaluation
from llmprune.recipe.model import ModelSource
from llmprune.report.task_table import table_of_one, table_of_two
from llmprune.results.figures.evaluation import GateFigures
from llmprune.results.sentences.evaluation import describe_verdict

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
    """Evaluate one or two models, print a table, and write ``evaluation.json`` into the folder ``output``.

    Problems with tasks, models or the folder are raised before weights are read. Results of finished tasks are kept
    in ``output``, and those of the base in the user's cache, so that an interrupted evaluation can continue.
    Under a launcher the processes share the samples. Raises GateNotMet after everything is written.
    """
    quiet_libraries()
    with synchronized():
        gate = _evaluate(model, against, settings=settings, output=output, console=console)
    if gate and not gate.passed:
        raise GateNotMet(_with_option_names(describe_verdict(gate)))


def _evaluate(
    model: ModelSource, against: ModelSource | None, *, settings: Evaluation, output: Path | None, console: Console
) -> GateFigures | None:
    """Evaluate, print and write; return the verdict, or None without a gate."""
    with errors_with_option_names():
        check_tasks(settings)
    judged = _subject(model, output)
    base = _subject(against) if against is not None else None
    if against is not None and base is not None:
        require_same_tokenizer(against.id, base.tokenizer, model=model.id, other=judged.tokenizer)
    if output is not None:
        _make_folder(output)
    with errors_with_option_names():
        fetch_tasks(settings)
        results = evaluate_tasks(judged, "pruned", evaluation=settings)
    judged.whole.release()
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
        base_results = evaluate_tasks(base, "dense", evaluation=settings)
        figures = compare(base_results, results, confidence=settings.gate.confidence if settings.gate else CONFIDENCE)
        gate = judge(settings.gate, figures)
        table = table_of_two(figures.tasks, figures.groups, mean=figures.mean)
        found |= {
            "against": against.id,
            "against_results": base_results.model_dump(mode="json"),
            "tasks": [task.model_dump(mode="json") for task in figures.tasks],
            "groups": [group.model_dump(mode="json") for group in figures.groups],
            "retention": figures.mean.model_dump(mode="json") if figures.mean else None,
            "gate": gate.model_dump(mode="json") if gate else None,
        }
    if is_first_process():
        _show(table, found, output=output, console=console)
    return gate


def _show(table: Table, found: dict[str, Any], *, output: Path | None, console: Console) -> None:
    console.print(table)
    if output is not None:
        write_text(output / "evaluation.json", json.dumps(found, indent=1) + "\n")
        console.print(Text(f"written to {output / 'evaluation.json'}"), soft_wrap=True)


def _subject(source: ModelSource, output: Path | None = None) -> EvaluatedModel:
    """Return a model to evaluate; its weights are read when the first task needs them."""
    tokenizer = load_tokenizer(source)
    return evaluated_model(source, tokenizer, folder=output / "tasks" if output else None)


@contextmanager
def errors_with_option_names() -> Iterator[None]:
    """Raise errors about tasks with option names in place of recipe keys."""
    try:
        yield
    except (RecipeError, EvaluationError) as error:
        raise type(error)(_with_option_names(str(error))) from error


def _with_option_names(message: str) -> str:
    """Replace keys of a recipe by the options of ``llmprune eval``."""
    for key, option in _OPTIONS.items():
        message = message.replace(key, option)
    return message


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the output folder {output} cannot be created: {error}; choose another --output") from error
