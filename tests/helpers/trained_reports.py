"""Handmade reports of a model that was trained after the cut."""

from __future__ import annotations

import math
from typing import Any

from helpers.reports import PERPLEXITY, PROVENANCE, sample_report, sample_tasks
from llmprune.results.figures.evaluation import Interval
from llmprune.results.figures.recovery import MeanScore, RecoveryCheck, RecoveryFigures, RecoveryScore, RecoveryScores
from llmprune.results.report_schema import (
    Report,
)


def trained(before: dict[str, float], *, after: dict[str, float], best: int = 2, **changes: Any) -> RecoveryFigures:
    """Return a training of three checks, of which check ``best`` was saved; ``before``, ``after``: KL by source."""
    checks = []
    for number in range(3):
        divergence = {name: (before[name], (before[name] + after[name]) / 2, after[name])[number] for name in before}
        perplexity = {name: 20 * math.exp(min(value, 50)) for name, value in divergence.items()}
        loss = None if number == 0 else 0.5 - 0.1 * number
        checks.append(
            RecoveryCheck(
                step=number * 30,
                tokens=number * 61_440,
                loss=loss,
                divergence=divergence,
                perplexity=perplexity,
                kept=number <= best,
            )
        )
    values: dict[str, Any] = {
        "method": "full",
        "loss": "distillation",
        "steps": 60,
        "tokens": 122_880,
        "batch_tokens": 2048,
        "learning_rate": 3e-4,
        "sources": PROVENANCE.calibration_sources,
        "dense_perplexity": dict.fromkeys(before, 20.0),
        "checks": tuple(checks),
        "best_step": best * 30,
        "seconds": 903.0,
        "kilowatt_hours": 0.0127,
    }
    values |= changes
    values["generated"] = sum(source.windows for source in values["sources"] if source.text is None)
    return RecoveryFigures(**values)


def trained_report(**changes: Any) -> Report:
    """Return the sample report of a model that was trained after the cut, with scores from before it."""
    recovery = trained(
        {"web": 0.41, "code": 0.83, "self_generated": 0.52}, after={"web": 0.26, "code": 0.71, "self_generated": 0.30}
    )
    scores = tuple(
        RecoveryScore(
            task=after.task,
            metric=after.metric,
            dense=after.dense,
            before=after.pruned - 0.03,
            after=after.pruned,
            retention_before=0.882,
            retention_before_interval=Interval(low=0.851, high=0.913, confidence=0.95) if after.interval else None,
            gain=1.052,
            gain_interval=Interval(low=1.013, high=1.094, confidence=0.95) if after.interval else None,
            lost=None if after.lost is None else 12,
            gained=None if after.lost is None else 27,
            p_value=None if after.lost is None else 0.024,
            samples=after.samples,
        )
        for after in sample_tasks()
    )
    compared = RecoveryScores(
        scores=scores,
        retention_before=MeanScore(ratio=0.891, interval=Interval(low=0.862, high=0.919, confidence=0.95)),
        gain=MeanScore(ratio=1.061, interval=Interval(low=1.021, high=1.102, confidence=0.95)),
    )
    perplexity = PERPLEXITY.model_copy(update={"repaired": 26.31})
    return sample_report(**{"recovery": recovery, "recovery_scores": compared, "perplexity": perplexity} | changes)
