"""Evaluation of one model on lm-eval tasks, sample by sample: in memory, or by a backend in its own process."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import EvaluationError, NumericalError, RecipeError
from llmprune.evaluation.lm_eval.loaded_task import LoadedTask
from llmprune.evaluation.lm_eval.results import Answer, Sample, TaskResult, TaskResults
from llmprune.evaluation.lm_eval.store import ResultStore, baselines_folder
from llmprune.evaluation.lm_eval.tasks import (
    load_tasks,
    quiet_unless_watched,
    seed_everything,
    task_fingerprint,
)
from llmprune.evaluation.more_samples import can_continue, join_results
from llmprune.evaluation.whole_model import WholeModel
from llmprune.recipe.evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmprune.recipe.model import ModelSource

_ANSWERS = 3  # kept of each generative task as examples


@dataclass(frozen=True)
class EvaluatedModel:
    """Model to be evaluated, loaded when the first task needs it."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase | None  # needed by tasks only
    place: str  # folder or hub id, for a backend
    store: ResultStore  # of finished tasks
    whole: WholeModel


def evaluated_model(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    folder: Path | None = None,
    load: Callable[[], PreTrainedModel] | None = None,
) -> EvaluatedModel:
    """Return a model with its result store, which distinguishes files, commit, dtype and device.

    ``folder``: for the results of finished tasks; without it they are stored in the cache of base models. ``load``:
    loads the model otherwise than from ``source``; the folder must then be its own.
    """
    import torch

    from llmprune.checkpoint.loading import load_model
    from llmprune.checkpoint.location import folder_of, hub_commit, identity

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    identity_text = json.dumps([identity(source), source.dtype, device])
    store = (
        ResultStore(baselines_folder(), identity_text, shared=True)
        if folder is None
        else ResultStore(folder, identity_text)
    )
    place = source.id if hub_commit(source) else str(folder_of(source, "weights"))
    return EvaluatedModel(source, tokenizer, place, store, WholeModel(load or partial(load_model, source)))


def evaluate_tasks(
    model: EvaluatedModel, side: str, *, evaluation: Evaluation, earlier: Evaluation | None = None
) -> TaskResults:
    """Evaluate a model on every task, by the recipe's backend or in memory.

    ``side``: dense, pruned or repaired (before the training), which selects the backend's arguments.
    ``earlier``: settings of an evaluation with smaller limits, whose stored answers are reused.

    Equal settings give two models exactly the same requests. With several processes all take part. Raises
    EvaluationError if a task or its data cannot be loaded, NumericalError if a metric is not finite.
    """
    from llmprune.common.distributed import broadcast_from_first, is_first_process

    if evaluation.backend:
        from llmprune.evaluation.lm_eval.backend import run_backend

        found = (
            run_backend(model.place, side, evaluation=evaluation, store=model.store, earlier=earlier)
            if is_first_process()
            else None
        )
        found = broadcast_from_first(found)
        assert found is not None, "the first process has the results or raises"
        return found

    def load_lm() -> Any:
        from llmprune.evaluation.lm_eval.model_in_memory import ModelInMemory

        assert model.tokenizer is not None, "tasks need a tokenizer"
        return ModelInMemory(
            model.whole.get(),
            model.tokenizer,
            batch_size=evaluation.batch_size,
            side=side,
            reductions=model.whole.reductions,
        )

    return run_tasks(load_lm, evaluation, store=model.store, earlier=earlier)


def run_tasks(
    load_lm: Callable[[], Any],
    evaluation: Evaluation,
    *,
    store: ResultStore | None = None,
    earlier: Evaluation | None = None,
) -> TaskResults:
    """Evaluate one lm-eval model on every task. Stored results are reused; ``load_lm`` is called if one is missing.

    ``earlier``: settings with smaller limits, whose stored answers are extended if the task allows it.

    Sets the global random seeds. Shows lm-eval's progress on a terminal only.
    """
    from llmprune.common.distributed import broadcast_from_first, is_first_process

    lm: Any = None
    results = []
    with quiet_unless_watched():
        for task in load_tasks(evaluation):
            key = task_fingerprint(task, evaluation)
            result = broadcast_from_first(store.get(task.name, key) if store and is_first_process() else None)
            if result is None:
                before = broadcast_from_first(
                    _stored_before(task, evaluation, store=store, earlier=earlier)
                    if store and is_first_process()
                    else None
                )
                lm = lm or load_lm()
                result = broadcast_from_first(_run(lm, task, evaluation=evaluation, before=before))
                assert result is not None, "the first process has the result"
                if store and is_first_process():
                    store.put(result, key)
            results.append(result)
    return TaskResults(tasks=tuple(results))


def _stored_before(
    task: LoadedTask, evaluation: Evaluation, *, store: ResultStore, earlier: Evaluation | None
) -> TaskResult | None:
    """Return the stored result of the earlier settings, if the remaining documents can be evaluated separately."""
    if earlier is None:
        return None
    found = store.get(task.name, task_fingerprint(task, earlier))
    remaining = found is not None and len(found.samples) < min(
        task.limit(evaluation) or math.inf, len(task.task.eval_docs)
    )
    return found if found is not None and remaining and can_continue(task.task, found) else None


def _run(lm: Any, task: LoadedTask, *, evaluation: Evaluation, before: TaskResult | None = None) -> TaskResult | None:
    """Evaluate one task, on the documents after those of ``before``; None in processes other than the first."""
    # lm_eval.evaluate, not simple_evaluate: the latter also collects a description of the machine, which took 2.6 s
    # per call, and requests the model's commit from the hub.
    from lm_eval import evaluate

    seed_everything(evaluation.seed)
    documents, limit = len(task.task.eval_docs), task.limit(evaluation)
    wanted = range(len(before.samples) if before else 0, min(documents, limit or documents))
    own = lm._rank, lm._world_size
    if len(wanted) < lm._world_size:  # some processes would get no document, so each evaluates all
        lm._rank, lm._world_size = 0, 1
    try:
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {task.name: task.task}},
            limit=None if before else limit,
            samples={task.name: wanted} if before else None,
            bootstrap_iters=0,
            log_samples=True,
        )
    finally:
        lm._rank, lm._world_size = own
    if found is None:
        return None
    result = _result(task, found, wanted=evaluation.metrics.get(task.name), documents=documents)
    return join_results(task.task, before, more=result) if before else result


def _result(task: LoadedTask, found: dict[str, Any], *, wanted: str | None, documents: int) -> TaskResult:
    rows, metrics = found["samples"][task.name], found["results"][task.name]
    directions = found["higher_is_better"][task.name]
    metric, filter_name = _metric(task.name, rows, metrics=metrics, directions=directions, wanted=wanted)
    value = float(metrics[f"{metric},{filter_name}"])
    if not math.isfinite(value):
        raise NumericalError(f"the task {task.name!r} gave {metric} = {value}; the model's logits are not finite")
    kept = sorted((row for row in rows if row["filter"] == filter_name), key=lambda row: row["doc_id"])
    numbers = {key: _number(figure) for key, figure in metrics.items() if "," in key and "_stderr," not in key}
    return TaskResult(
        task=task.name,
        metric=metric,
        filter=filter_name,
        higher_is_better=directions.get(metric) is not False,
        value=value,
        samples=tuple(_sample(row, metric) for row in kept),
        group=task.group,
        documents=documents,
        values={key: number for key, number in numbers.items() if number is not None},
        answers=tuple(map(_answer, kept[:_ANSWERS])) if task.task.OUTPUT_TYPE == "generate_until" else (),
    )


def _metric(
    task: str,
    rows: Sequence[dict[str, Any]],
    *,
    metrics: dict[str, Any],
    directions: dict[str, Any],
    wanted: str | None,
) -> tuple[str, str]:
    """Return metric and filter of the result: the recipe's, or the first of each."""
    filters = list(dict.fromkeys(row["filter"] for row in rows))
    metric, _, filter_name = (wanted or "").partition(",")
    if filter_name and filter_name not in filters:
        raise RecipeError(f"evaluation.metrics: the task {task!r} has no filter {filter_name!r}; it has {filters}")
    filter_name = filter_name or filters[0]
    candidates = (
        [metric] if metric else [*directions, *rows[0]["metrics"]]
    )  # directions are in the order of the metric list
    found = next((name for name in candidates if f"{name},{filter_name}" in metrics), None)
    if found is None:
        listed = ", ".join(name for name in metrics if "," in name)
        raise EvaluationError(
            f"the task {task!r} gave no metric {metric or ''} under its filter {filter_name!r}; name one of these in "
            f"evaluation.metrics: {listed}"
        )
    return found, filter_name


def _sample(row: dict[str, Any], metric: str) -> Sample:
    responses = json.dumps(row["resps"], default=str)
    return Sample(
        doc_id=row["doc_id"],
        doc_hash=_document_hash(row),
        prompt_hash=row["prompt_hash"],
        value=_number(row.get(metric)),
        answer_hash=hashlib.sha256(responses.encode()).hexdigest()[:16],
    )


def _document_hash(row: dict[str, Any]) -> str:
    """Return lm-eval's hash of a document; of one with images a hash of its fields, where lm-eval takes addresses."""
    if not any(isinstance(argument, dict) and "visual" in argument for argument in row["arguments"][0]):
        return str(row["doc_hash"])
    text = json.dumps(row["doc"], default=_pixels, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _pixels(value: Any) -> str:
    """Return a hash of an image's pixels; of anything else its text."""
    if not hasattr(value, "tobytes"):
        return str(value)
    return hashlib.sha256(value.tobytes()).hexdigest()


def _answer(row: dict[str, Any]) -> Answer:
    text = row["resps"][0][0]
    return Answer(doc_id=row["doc_id"], prompt=str(row["arguments"][0][0])[-600:], text=str(text)[:2000])


def _number(value: Any) -> float | None:
    """Return a finite number as float, numpy scalars included; None for anything else, such as f1's pairs."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
