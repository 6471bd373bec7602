"""Scores before and after the training, joined by document. Pure functions.

Two comparisons of ``retention`` on the same documents: the dense model with the one before the training, and this one
with the trained model. Each ratio has the paired interval of its own comparison.
"""

from __future__ import annotations

from llmprune.evaluation.lm_eval.results import TaskResults
from llmprune.evaluation.retention import CONFIDENCE, Comparison, compare
from llmprune.results.figures.evaluation import RetentionFigures, TaskFigures
from llmprune.results.figures.recovery import MeanScore, RecoveryScore, RecoveryScores


def compare_recovery(
    dense: TaskResults, before: TaskResults, *, after: TaskResults, confidence: float = CONFIDENCE
) -> RecoveryScores:
    """Return the scores of dense model, model before the training and trained model, with paired intervals.

    Raises EvaluationError unless all have the same tasks, metrics, filters, documents and prompts.
    """
    kept = compare(dense, before, confidence=confidence)
    gained = compare(before, after, confidence=confidence)
    pairs = zip(_groups_first(kept), _groups_first(gained), strict=True)
    return RecoveryScores(
        scores=tuple(_score(one, other) for one, other in pairs),
        retention_before=_mean(kept.mean),
        gain=_mean(gained.mean),
    )


def _groups_first(comparison: Comparison) -> tuple[TaskFigures, ...]:
    return (*comparison.groups, *comparison.tasks)


def _score(kept: TaskFigures, gained: TaskFigures) -> RecoveryScore:
    return RecoveryScore(
        task=kept.task,
        metric=kept.metric,
        higher_is_better=kept.higher_is_better,
        dense=kept.dense,
        before=gained.dense,
        after=gained.pruned,
        retention_before=kept.retention,
        retention_before_interval=kept.interval,
        gain=gained.retention,
        gain_interval=gained.interval,
        lost=gained.lost,
        gained=gained.gained,
        p_value=gained.p_value,
        samples=kept.samples,
    )


def _mean(found: RetentionFigures | None) -> MeanScore | None:
    return MeanScore(ratio=found.retention, interval=found.interval) if found else None
