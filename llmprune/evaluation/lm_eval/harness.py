"""lm-eval's tasks on one model, sample by sample: in memory, or by any lm-eval backend in a process of its own."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.errors import EvaluationError, NumericalError, RecipeError
from llmprune.evaluation.lm_eval.results import Answer, Sample, TaskResult, TaskResults
from llmprune.evaluation.lm_eval.store import ResultStore, baselines_folder
from llmprune.evaluation.lm_eval.tasks import (
    Loaded,
    load_tasks,
    quiet_unless_watched,
    seed_everything,
    task_fingerprint,
)
from llmprune.evaluation.more_samples import can_continue, joined
from llmprune.recipe.evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmprune.recipe.model import ModelSource

_ANSWERS = 3  # that are kept of each generative task, to be shown


@dataclass(frozen=True)
class Subject:
    """A model to be asked, loaded when the first task needs it."""

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase | None  # only tasks need one
    place: str  # folder or hub id, for a backend
    store: ResultStore  # where finished tasks are kept


def subject(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    load: Callable[[], PreTrainedModel],
    folder: Path | None = None,
) -> Subject:
    """A model as it is now: other files, another commit, arithmetic or device are another model to its store.

    ``folder`` keeps this model's finished tasks; without it they go to the cache of base models.
    """
    import torch

    from llmprune.checkpoint.location import folder_of, hub_commit, identity

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    depends = json.dumps([identity(source), source.dtype, device])
    store = ResultStore(baselines_folder(), depends, shared=True) if folder is None else ResultStore(folder, depends)
    place = source.id if hub_commit(source) else str(folder_of(source, "weights"))
    return Subject(load, tokenizer, place, store)


def ask(model: Subject, side: str, *, evaluation: Evaluation, earlier: int | None = None) -> TaskResults:
    """Every task of the evaluation, by its backend or in memory; ``side`` is dense or pruned.

    ``earlier``: the limit of an evaluation whose answers are kept, where they are in the store.

    Equal settings ask two models exactly the same questions. Under a launcher every process takes part.
    Raises EvaluationError where a task or its data cannot be loaded, NumericalError where its metric is not finite.
    """
    from llmprune.common.distributed import from_first, is_first

    if evaluation.backend:
        from llmprune.evaluation.lm_eval.backend import ask_backend

        found = (
            ask_backend(model.place, side, evaluation=evaluation, store=model.store, earlier=earlier)
            if is_first()
            else None
        )
        found = from_first(found)
        assert found is not None, "the first process has the results or raises"
        return found

    def open_model() -> Any:
        assert model.tokenizer is not None, "tasks need a tokenizer"
        return in_memory(model.load(), model.tokenizer, batch_size=evaluation.batch_size)

    return run_tasks(open_model, evaluation, store=model.store, earlier=earlier)


def run_tasks(
    open_model: Callable[[], Any],
    evaluation: Evaluation,
    *,
    store: ResultStore | None = None,
    earlier: int | None = None,
) -> TaskResults:
    """Every task on one lm-eval model; what the store has is not asked again, and the model then perhaps not opened.

    ``earlier``: a smaller limit, whose answers in the store are continued where the task allows it.

    Sets the global random seeds, and shows lm-eval's progress on a terminal only.
    """
    from llmprune.common.distributed import from_first, is_first

    lm: Any = None
    results = []
    with quiet_unless_watched():
        for one in load_tasks(evaluation):
            key = task_fingerprint(one, evaluation)
            result = from_first(store.get(one.name, key) if store and is_first() else None)
            if result is None:
                before = from_first(
                    _answered(one, evaluation, store=store, earlier=earlier) if store and is_first() else None
                )
                lm = lm or open_model()
                result = from_first(_run(lm, one, evaluation=evaluation, before=before))
                assert result is not None, "the first process has the result"
                if store and is_first():
                    store.put(result, key)
            results.append(result)
    return TaskResults(tasks=tuple(results))


def in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Any:
    """lm-eval's view of a model where it lies; under a launcher each process takes its share of the samples."""
    from lm_eval.models.huggingface import HFLM

    from llmprune.common.distributed import count, rank, talker
    from llmprune.evaluation.bench.generation_speed import input_device

    # HFLM gives the tokenizer a padding token, which must not reach the saved checkpoint.
    lm: Any = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    lm._device = input_device(model)  # HFLM would send the inputs of an offloaded model to "meta"
    if count() > 1:  # HFLM leaves the sharing of a model in memory to its caller
        lm.accelerator, lm._rank, lm._world_size = talker(), rank(), count()
    return lm


def _answered(one: Loaded, evaluation: Evaluation, *, store: ResultStore, earlier: int | None) -> TaskResult | None:
    """What the store has under a smaller limit, where the rest of the documents can be asked alone."""
    if earlier is None:
        return None
    found = store.get(one.name, task_fingerprint(one, evaluation.model_copy(update={"limit": earlier})))
    left = found is not None and len(found.samples) < min(evaluation.limit or math.inf, len(one.task.eval_docs))
    return found if found is not None and left and can_continue(one.task, found) else None


def _run(lm: Any, one: Loaded, *, evaluation: Evaluation, before: TaskResult | None = None) -> TaskResult | None:
    """One task, continued after the documents of ``before``; None in processes other than the first."""
    # lm_eval.evaluate, not simple_evaluate: the latter also collects a description of the
    # machine, which took 2.6 s a call, and asks the hub for the model's commit.
    from lm_eval import evaluate

    seed_everything(evaluation.seed)
    documents = len(one.task.eval_docs)
    asked = range(len(before.samples) if before else 0, min(documents, evaluation.limit or documents))
    shared = lm._rank, lm._world_size
    if len(asked) < lm._world_size:  # some would get no document: all do all
        lm._rank, lm._world_size = 0, 1
    try:
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {one.name: one.task}},
            limit=None if before else evaluation.limit,
            samples={one.name: asked} if before else None,
            bootstrap_iters=0,
            log_samples=True,
        )
    finally:
        lm._rank, lm._world_size = shared
    if found is None:
        return None
    result = _chosen(one, found, wanted=evaluation.metrics.get(one.name), documents=documents)
    return joined(one.task, before, more=result) if before else result


def _chosen(one: Loaded, found: dict[str, Any], *, wanted: str | None, documents: int) -> TaskResult:
    rows, reached = found["samples"][one.name], found["results"][one.name]
    directions = found["higher_is_better"][one.name]
    metric, filter_name = _metric(one.name, rows, reached=reached, directions=directions, wanted=wanted)
    value = float(reached[f"{metric},{filter_name}"])
    if not math.isfinite(value):
        raise NumericalError(f"the task {one.name!r} gave {metric} = {value}; the model's logits are not finite")
    kept = sorted((row for row in rows if row["filter"] == filter_name), key=lambda row: row["doc_id"])
    numbers = {key: _number(figure) for key, figure in reached.items() if "," in key and "_stderr," not in key}
    return TaskResult(
        task=one.name,
        metric=metric,
        filter=filter_name,
        higher_is_better=directions.get(metric) is not False,
        value=value,
        samples=tuple(_sample(row, metric) for row in kept),
        group=one.group,
        documents=documents,
        values={key: number for key, number in numbers.items() if number is not None},
        answers=tuple(map(_answer, kept[:_ANSWERS])) if one.task.OUTPUT_TYPE == "generate_until" else (),
    )


def _metric(
    name: str,
    rows: Sequence[dict[str, Any]],
    *,
    reached: dict[str, Any],
    directions: dict[str, Any],
    wanted: str | None,
) -> tuple[str, str]:
    """The metric and the filter that count: the recipe's, or the first of each."""
    filters = list(dict.fromkeys(row["filter"] for row in rows))
    metric, _, filter_name = (wanted or "").partition(",")
    if filter_name and filter_name not in filters:
        raise RecipeError(f"evaluation.metrics: the task {name!r} has no filter {filter_name!r}; it has {filters}")
    filter_name = filter_name or filters[0]
    candidates = [metric] if metric else [*directions, *rows[0]["metrics"]]  # directions: as the metric list is
    found = next((one for one in candidates if f"{one},{filter_name}" in reached), None)
    if found is None:
        raise EvaluationError(f"the task {name!r} gave no metric {metric or ''} under its filter {filter_name!r}")
    return found, filter_name


def _sample(row: dict[str, Any], metric: str) -> Sample:
    said = json.dumps(row["resps"], default=str)
    return Sample(
        doc_id=row["doc_id"],
        doc_hash=row["doc_hash"],
        prompt_hash=row["prompt_hash"],
        value=_number(row.get(metric)),
        answer_hash=hashlib.sha256(said.encode()).hexdigest()[:16],
    )


def _answer(row: dict[str, Any]) -> Answer:
    said = row["resps"][0][0]
    return Answer(doc_id=row["doc_id"], prompt=str(row["arguments"][0][0])[-600:], text=str(said)[:2000])


def _number(value: Any) -> float | None:
    """A plain, finite number; numpy's scalars have ``item``, f1's pairs are no number."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
