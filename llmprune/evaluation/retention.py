"""Retention of each task's score, from the results of both models joined by document. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from llmprune.common.errors import EvaluationError
from llmprune.evaluation.lm_eval.results import Sample, TaskResult, TaskResults
from llmprune.evaluation.statistics import DRAWS, interval, mcnemar, mean_draws, ratio_draws
from llmprune.results.figures.evaluation import Example, Interval, RetentionFigures, TaskFigures

if TYPE_CHECKING:
    from llmprune.evaluation.statistics import Floats

CONFIDENCE = 0.95
Pair = tuple[Sample, Sample]  # dense, pruned


@dataclass(frozen=True)
class Comparison:
    """Figures of every task, of the groups in the recipe, and of the mean; a group counts in place of its tasks."""

    tasks: tuple[TaskFigures, ...] = ()
    groups: tuple[TaskFigures, ...] = ()
    mean: RetentionFigures | None = None

    def named(self, name: str) -> TaskFigures | None:
        """Return a task or group by its name; for a group of one task, that task.

        None for a group whose tasks have different metrics, and for a name that was not evaluated.
        """
        found = next((task for task in (*self.groups, *self.tasks) if task.task == name), None)
        members = self.members(name)
        return members[0] if found is None and len(members) == 1 else found

    def members(self, group: str) -> tuple[TaskFigures, ...]:
        """Return the tasks of a group."""
        return tuple(task for task in self.tasks if task.group == group)


@dataclass(frozen=True)
class _Joined:
    """Results of both models in one task or group, and the samples of each document."""

    dense: TaskResult
    pruned: TaskResult
    pairs: list[Pair]


@dataclass(frozen=True)
class _Estimate:
    """Figures with the bootstrap draws of their retention; None without an interval."""

    figures: TaskFigures
    draws_B: Floats | None


def compare(dense: TaskResults, pruned: TaskResults, *, confidence: float = CONFIDENCE) -> Comparison:
    """Return the figures of each task, in the order of ``dense``, and of groups and mean.

    A group in the recipe counts as one task in the mean, over its pooled documents (lm-eval's default weighting).
    Tasks of a tag count separately. A metric that is not a mean over documents (perplexity) has no interval and is not
    in the mean. Raises EvaluationError unless both models have the same tasks, metrics, filters, documents and prompts.
    """
    after = {result.task: result for result in pruned.tasks}
    if unpaired := sorted({result.task for result in dense.tasks} ^ after.keys()):
        raise EvaluationError(
            f"only one of dense and pruned was evaluated on {', '.join(unpaired)}; "
            "evaluate both with the same evaluation section"
        )
    joined = [_join(result, after[result.task]) for result in dense.tasks]
    tasks = [_estimate(task, confidence) for task in joined]
    groups = []
    for name in dict.fromkeys(result.group for result in dense.tasks if result.group):
        members = [task for task in joined if task.dense.group == name]
        if len(members) > 1 and len({(task.dense.metric, task.dense.higher_is_better) for task in members}) == 1:
            groups.append(_estimate(_pooled(name, members), confidence))
    pooled = {group.figures.task for group in groups}
    counted = [*groups, *(task for task in tasks if task.figures.group not in pooled)]
    return Comparison(
        tuple(task.figures for task in tasks), tuple(group.figures for group in groups), _mean(counted, confidence)
    )


def _mean(estimates: Sequence[_Estimate], confidence: float) -> RetentionFigures | None:
    drawn = {task.figures.task: task.draws_B for task in estimates if task.draws_B is not None}
    counted = [task.figures for task in estimates if task.figures.task in drawn]
    kept = [figures.retention for figures in counted if figures.retention is not None]
    if not kept:
        return None
    point = fmean(kept)
    low, high = interval(mean_draws(drawn), point, confidence=confidence)
    return RetentionFigures(
        retention=point,
        interval=Interval(low=low, high=high, confidence=confidence),
        counted=tuple(figures.task for figures in counted),
        left_out=tuple(task.figures.task for task in estimates if task.figures.task not in drawn),
        samples=sum(figures.samples for figures in counted),
    )


def _join(dense: TaskResult, pruned: TaskResult) -> _Joined:
    """Pair the samples of every document. Raises EvaluationError unless both results have the same documents."""
    for field in ("metric", "filter", "higher_is_better"):
        before, after = getattr(dense, field), getattr(pruned, field)
        if before != after:
            raise EvaluationError(
                f"{dense.task}: {field} is {before!r} for dense and {after!r} for pruned; "
                "evaluate both with the same lm-eval"
            )
    by_document = {sample.doc_id: sample for sample in pruned.samples}
    if unpaired := {sample.doc_id for sample in dense.samples} ^ by_document.keys():
        raise EvaluationError(
            f"{dense.task}: dense has {len(dense.samples)} samples and pruned {len(by_document)}, {len(unpaired)} "
            "of them unpaired; evaluate both with the same limit"
        )
    for sample in dense.samples:
        other = by_document[sample.doc_id]
        if (sample.doc_hash, sample.prompt_hash) != (other.doc_hash, other.prompt_hash):
            part = "document" if sample.doc_hash != other.doc_hash else "prompt"
            raise EvaluationError(
                f"{dense.task}: the {part} of sample {sample.doc_id} is not the same for dense and pruned; "
                "evaluate both again with the same data, num_fewshot and seed"
            )
    return _Joined(dense, pruned, [(sample, by_document[sample.doc_id]) for sample in dense.samples])


def _pooled(name: str, members: Sequence[_Joined]) -> _Joined:
    """Pool the documents of a group's tasks, as if they were one task."""
    pairs = [pair for task in members for pair in task.pairs]
    weights = [len(task.pairs) for task in members]
    first = members[0].dense
    documents = [task.dense.documents for task in members]

    def pooled(results: Sequence[TaskResult], samples: Sequence[Sample]) -> TaskResult:
        value = sum(result.value * weight for result, weight in zip(results, weights, strict=True)) / sum(weights)
        return TaskResult(
            task=name,
            metric=first.metric,
            filter=first.filter,
            higher_is_better=first.higher_is_better,
            value=value,
            samples=tuple(samples),
            documents=None if None in documents else sum(filter(None, documents)),
        )

    dense = pooled([task.dense for task in members], [sample for sample, _ in pairs])
    pruned = pooled([task.pruned for task in members], [sample for _, sample in pairs])
    return _Joined(dense, pruned, pairs)


def _estimate(task: _Joined, confidence: float) -> _Estimate:
    dense, pruned = task.dense, task.pruned
    lost, gained = _flips(task.pairs, dense.higher_is_better)
    retention = _retention(dense.value, pruned.value, higher_is_better=dense.higher_is_better)
    draws_B = None if retention is None else _draws(task)
    span = None
    if draws_B is not None and retention is not None:
        low, high = interval(draws_B, retention, confidence=confidence)
        span = Interval(low=low, high=high, confidence=confidence)
    figures = TaskFigures(
        task=dense.task,
        group=dense.group,
        metric=dense.metric,
        filter=dense.filter,
        higher_is_better=dense.higher_is_better,
        dense=dense.value,
        pruned=pruned.value,
        retention=retention,
        interval=span,
        samples=len(task.pairs),
        documents=dense.documents,
        lost=lost,
        gained=gained,
        p_value=None if lost is None or gained is None else mcnemar(lost, gained),
        identical=_identical(task.pairs),
        examples=_examples(dense, pruned),
    )
    return _Estimate(figures, draws_B)


def _flips(pairs: Sequence[Pair], higher_is_better: bool) -> tuple[int, int] | tuple[None, None]:
    """Count the samples that were right before and wrong after, and the reverse. None unless each value is 0 or 1."""
    values = [(before.value, after.value) for before, after in pairs]
    if not all(value in (0.0, 1.0) for pair in values for value in pair):
        return None, None
    fell, rose = values.count((1.0, 0.0)), values.count((0.0, 1.0))
    return (fell, rose) if higher_is_better else (rose, fell)


def _draws(task: _Joined) -> Floats | None:
    """Return draws of the retention; None if the metric is not a mean of non-negative values over the documents."""
    import numpy as np

    dense, pruned, pairs = task.dense, task.pruned, task.pairs
    before = [sample.value for sample, _ in pairs if sample.value is not None]
    after = [sample.value for _, sample in pairs if sample.value is not None]
    if not len(before) == len(after) == len(pairs) or min((*before, *after), default=-1) < 0:
        return None
    means = (fmean(before), dense.value), (fmean(after), pruned.value)
    if any(abs(mean - value) > 1e-9 * max(1, abs(value)) for mean, value in means):
        return None
    if _identical(pairs):  # the same model: no number of documents would show a difference
        return np.ones(DRAWS)
    divisor, dividend = (before, after) if dense.higher_is_better else (after, before)
    return ratio_draws(np.array(divisor), np.array(dividend), name=dense.task)


def _identical(pairs: Sequence[Pair]) -> bool:
    """Check that every response is bit-equal, not only equally good."""
    return all(a.answer_hash is not None and a.answer_hash == b.answer_hash for a, b in pairs)


def _retention(dense: float, pruned: float, *, higher_is_better: bool) -> float | None:
    """Return the retention, above 1 if pruned is better; None for zero or negative scores, which have no ratio."""
    dividend, divisor = (pruned, dense) if higher_is_better else (dense, pruned)
    return dividend / divisor if divisor > 0 and dividend >= 0 else None


def _examples(dense: TaskResult, pruned: TaskResult) -> tuple[Example, ...]:
    texts = {answer.doc_id: answer.text for answer in pruned.answers}
    return tuple(
        Example(prompt=answer.prompt, dense=answer.text, pruned=texts[answer.doc_id])
        for answer in dense.answers
        if answer.doc_id in texts
    )
