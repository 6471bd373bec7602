"""What pruning kept of each task: dense and pruned joined document by document. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from llmprune.common.errors import EvaluationError
from llmprune.evaluation.lm_eval.results import Sample, TaskResult, TaskResults
from llmprune.evaluation.statistics import DRAWS, interval, mcnemar, mean_draws, ratio_draws
from llmprune.results.evaluation_figures import Example, Interval, RetentionFigures, TaskFigures

if TYPE_CHECKING:
    from llmprune.evaluation.statistics import Floats

CONFIDENCE = 0.95
Pair = tuple[Sample, Sample]
_Joined = tuple[TaskResult, TaskResult, list[Pair]]


@dataclass(frozen=True)
class Comparison:
    """Every task, the groups that the recipe named, and the mean over both, a group in place of its tasks."""

    tasks: tuple[TaskFigures, ...] = ()
    groups: tuple[TaskFigures, ...] = ()
    mean: RetentionFigures | None = None

    def named(self, name: str) -> TaskFigures | None:
        """Return a task or group by its name. A group of one task is that task.

        None for a group whose tasks have different metrics, and for what was not evaluated.
        """
        whole = next((one for one in (*self.groups, *self.tasks) if one.task == name), None)
        members = self.members(name)
        return members[0] if whole is None and len(members) == 1 else whole

    def members(self, group: str) -> tuple[TaskFigures, ...]:
        """Return the tasks that came with a group."""
        return tuple(one for one in self.tasks if one.group == group)


@dataclass(frozen=True)
class _Judged:
    """Figures, and the draws that their interval came from; None where there is no interval."""

    figures: TaskFigures
    draws_B: Floats | None


def compare(dense: TaskResults, pruned: TaskResults, *, confidence: float = CONFIDENCE) -> Comparison:
    """Figures of each task, in the order of ``dense``.

    A group that the recipe named is one task in the mean: its documents together, as lm-eval weighs them by default.
    Tasks of a tag count each. What is no mean over documents (perplexities) has no interval and is left out of it.
    Raises EvaluationError unless both models met the same tasks, metrics, filters, documents and prompts.
    """
    after = {result.task: result for result in pruned.tasks}
    if unpaired := sorted({result.task for result in dense.tasks} ^ after.keys()):
        raise EvaluationError(
            f"only one of dense and pruned was evaluated on {', '.join(unpaired)}; "
            "evaluate both with the same evaluation section"
        )
    joined = [(result, after[result.task], _join(result, after[result.task])) for result in dense.tasks]
    tasks = [_judge_task(one[0], one[1], pairs=one[2], confidence=confidence) for one in joined]
    groups = []
    for name in dict.fromkeys(result.group for result in dense.tasks if result.group):
        members = [one for one in joined if one[0].group == name]
        if len(members) > 1 and len({(one[0].metric, one[0].higher_is_better) for one in members}) == 1:
            dense_group, pruned_group, pairs = _pooled(name, members)
            groups.append(_judge_task(dense_group, pruned_group, pairs=pairs, confidence=confidence))
    pooled = {one.figures.task for one in groups}
    units = [*groups, *(one for one in tasks if one.figures.group not in pooled)]
    return Comparison(
        tuple(one.figures for one in tasks), tuple(one.figures for one in groups), _mean(units, confidence)
    )


def _mean(units: Sequence[_Judged], confidence: float) -> RetentionFigures | None:
    drawn = {one.figures.task: one.draws_B for one in units if one.draws_B is not None}
    counted = [one.figures for one in units if one.figures.task in drawn]
    kept = [figures.retention for figures in counted if figures.retention is not None]
    if not kept:
        return None
    point = fmean(kept)
    low, high = interval(mean_draws(drawn), point, confidence=confidence)
    return RetentionFigures(
        retention=point,
        interval=Interval(low=low, high=high, confidence=confidence),
        counted=tuple(figures.task for figures in counted),
        left_out=tuple(one.figures.task for one in units if one.figures.task not in drawn),
        samples=sum(figures.samples for figures in counted),
    )


def _join(dense: TaskResult, pruned: TaskResult) -> list[Pair]:
    """The two outcomes of every document."""
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
            f"{dense.task}: dense met {len(dense.samples)} samples and pruned {len(by_document)}, {len(unpaired)} "
            "without their pair; evaluate both with the same limit"
        )
    for sample in dense.samples:
        other = by_document[sample.doc_id]
        if (sample.doc_hash, sample.prompt_hash) != (other.doc_hash, other.prompt_hash):
            what = "document" if sample.doc_hash != other.doc_hash else "prompt"
            raise EvaluationError(
                f"{dense.task}: the {what} of sample {sample.doc_id} is not the same for dense and pruned; "
                "evaluate both again with the same data, num_fewshot and seed"
            )
    return [(sample, by_document[sample.doc_id]) for sample in dense.samples]


def _pooled(name: str, members: Sequence[_Joined]) -> _Joined:
    """A group as one task over all its documents."""
    pairs = [pair for *_, joined in members for pair in joined]
    weights = [len(joined) for *_, joined in members]
    first = members[0][0]
    documents = [one.documents for one, *_ in members]

    def pooled(side: Literal[0, 1]) -> TaskResult:
        value = sum(one[side].value * weight for one, weight in zip(members, weights, strict=True)) / sum(weights)
        return TaskResult(
            task=name,
            metric=first.metric,
            filter=first.filter,
            higher_is_better=first.higher_is_better,
            value=value,
            samples=tuple(pair[side] for pair in pairs),
            documents=None if None in documents else sum(filter(None, documents)),
        )

    return pooled(0), pooled(1), pairs


def _judge_task(dense: TaskResult, pruned: TaskResult, *, pairs: Sequence[Pair], confidence: float) -> _Judged:
    lost, gained = _flips(pairs, dense.higher_is_better)
    retention = _retention(dense.value, pruned.value, higher_is_better=dense.higher_is_better)
    draws_B = None if retention is None else _draws(dense, pruned, pairs=pairs)
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
        samples=len(pairs),
        documents=dense.documents,
        lost=lost,
        gained=gained,
        p_value=None if lost is None or gained is None else mcnemar(lost, gained),
        identical=_identical(pairs),
        examples=_examples(dense, pruned),
    )
    return _Judged(figures, draws_B)


def _flips(pairs: Sequence[Pair], higher_is_better: bool) -> tuple[int, int] | tuple[None, None]:
    """Count the samples that were right before and wrong after, and the reverse. None unless each value is 0 or 1."""
    values = [(before.value, after.value) for before, after in pairs]
    if not all(value in (0.0, 1.0) for pair in values for value in pair):
        return None, None
    fell, rose = values.count((1.0, 0.0)), values.count((0.0, 1.0))
    return (fell, rose) if higher_is_better else (rose, fell)


def _draws(dense: TaskResult, pruned: TaskResult, *, pairs: Sequence[Pair]) -> Floats | None:
    """Draws of the retention; None where the metric is no mean of values from 0 over the documents."""
    import numpy as np

    before = [sample.value for sample, _ in pairs if sample.value is not None]
    after = [sample.value for _, sample in pairs if sample.value is not None]
    if not len(before) == len(after) == len(pairs) or min((*before, *after), default=-1) < 0:
        return None
    means = (fmean(before), dense.value), (fmean(after), pruned.value)
    if any(abs(mean - value) > 1e-9 * max(1, abs(value)) for mean, value in means):
        return None
    if _identical(pairs):  # the same model: then no number of documents would show a difference
        return np.ones(DRAWS)
    whole, kept = (before, after) if dense.higher_is_better else (after, before)
    return ratio_draws(np.array(whole), np.array(kept), name=dense.task)


def _identical(pairs: Sequence[Pair]) -> bool:
    """Whether every answer is the same to the last bit, not only as good."""
    return all(a.answer_hash is not None and a.answer_hash == b.answer_hash for a, b in pairs)


def _retention(dense: float, pruned: float, *, higher_is_better: bool) -> float | None:
    """Above 1 where pruned is better; None where a ratio says nothing (zero or negative metrics)."""
    kept, whole = (pruned, dense) if higher_is_better else (dense, pruned)
    return kept / whole if whole > 0 and kept >= 0 else None


def _examples(dense: TaskResult, pruned: TaskResult) -> tuple[Example, ...]:
    texts = {answer.doc_id: answer.text for answer in pruned.answers}
    return tuple(
        Example(prompt=answer.prompt, dense=answer.text, pruned=texts[answer.doc_id])
        for answer in dense.answers
        if answer.doc_id in texts
    )
