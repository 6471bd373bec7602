"""What pruning kept of each task: dense and pruned joined sample by sample. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from llmprune.errors import EvaluationError, RecipeError
from llmprune.evaluation.harness import Sample, TaskResult, TaskResults
from llmprune.evaluation.section import Gate
from llmprune.report.value import GateFigures, TaskFigures


def compare(dense: TaskResults, pruned: TaskResults) -> tuple[TaskFigures, ...]:
    """Figures of each task, in the order of ``dense``.

    Raises EvaluationError unless both models met the same tasks, metrics, documents and prompts.
    """
    dense_by_name = {result.task: result for result in dense.tasks}
    pruned_by_name = {result.task: result for result in pruned.tasks}
    if unpaired := sorted(dense_by_name.keys() ^ pruned_by_name.keys()):
        raise EvaluationError(
            f"only one of dense and pruned was evaluated on {', '.join(unpaired)}; "
            "evaluate both with the same evaluation section"
        )
    return tuple(_compare_task(result, pruned_by_name[name]) for name, result in dense_by_name.items())


def mean_retention(tasks: Sequence[TaskFigures]) -> float | None:
    """Unweighted mean over the tasks that have a retention; None where none has."""
    known = [figures.retention for figures in tasks if figures.retention is not None]
    return fmean(known) if known else None


def judge(gate: Gate | None, mean_retention: float | None) -> GateFigures | None:
    """The gate's verdict; None without a gate. Raises RecipeError where there is nothing to judge."""
    if gate is None:
        return None
    if mean_retention is None:
        raise RecipeError(
            "evaluation.gate: no task has a retention to judge; "
            "name a task that the dense model scores above zero in evaluation.tasks, or remove the gate"
        )
    return GateFigures(
        min_retention=gate.min_retention,
        retention=mean_retention,
        passed=mean_retention >= gate.min_retention,
    )


def _compare_task(dense: TaskResult, pruned: TaskResult) -> TaskFigures:
    for field in ("metric", "filter", "higher_is_better"):
        before, after = getattr(dense, field), getattr(pruned, field)
        if before != after:
            raise EvaluationError(
                f"{dense.task}: {field} is {before!r} for dense and {after!r} for pruned; "
                "evaluate both with the same lm-eval"
            )
    pairs = _pairs(dense, pruned)
    flips = [(before.value, after.value) for before, after in pairs]
    binary = all(value in (0.0, 1.0) for pair in flips for value in pair)
    return TaskFigures(
        task=dense.task,
        metric=dense.metric,
        dense=dense.value,
        pruned=pruned.value,
        retention=_retention(dense.value, pruned.value, dense.higher_is_better),
        samples=len(pairs),
        lost=flips.count((1.0, 0.0)) if binary else None,
        gained=flips.count((0.0, 1.0)) if binary else None,
    )


def _pairs(dense: TaskResult, pruned: TaskResult) -> list[tuple[Sample, Sample]]:
    before = {sample.doc_id: sample for sample in dense.samples}
    after = {sample.doc_id: sample for sample in pruned.samples}
    if unpaired := before.keys() ^ after.keys():
        raise EvaluationError(
            f"{dense.task}: dense met {len(before)} samples and pruned {len(after)}, {len(unpaired)} without "
            "their pair; evaluate both with the same limit"
        )
    for doc_id, sample in before.items():
        other = after[doc_id]
        if (sample.doc_hash, sample.prompt_hash) != (other.doc_hash, other.prompt_hash):
            what = "document" if sample.doc_hash != other.doc_hash else "prompt"
            raise EvaluationError(
                f"{dense.task}: the {what} of sample {doc_id} is not the same for dense and pruned; "
                "evaluate both again with the same data, num_fewshot and seed"
            )
    return [(sample, after[doc_id]) for doc_id, sample in before.items()]


def _retention(dense: float, pruned: float, higher_is_better: bool) -> float | None:
    """Above 1 where pruned is better; None where a ratio says nothing (zero or negative metrics)."""
    kept, whole = (pruned, dense) if higher_is_better else (dense, pruned)
    return kept / whole if whole > 0 and kept >= 0 else None
