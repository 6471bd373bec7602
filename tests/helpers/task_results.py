"""Handmade results of lm-eval tasks."""

from __future__ import annotations

import numpy as np

from llmprune.evaluation.lm_eval.results import Sample, TaskResult, TaskResults


def result(*values: float | None, task: str = "t", answers: str = "", **changes: object) -> TaskResult:
    """Return the result of a task with these values; different ``answers`` stand for another model."""
    samples = tuple(
        Sample(
            doc_id=index,
            doc_hash=f"d{index}",
            prompt_hash=f"p{index}",
            value=value,
            answer_hash=f"{value}{answers}",
        )
        for index, value in enumerate(values)
    )
    fields = {
        "task": task,
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "value": sum(value or 0.0 for value in values) / len(values),
        "samples": samples,
    }
    return TaskResult.model_validate(fields | changes)


def answers(seed: int, count: int, accuracy: float) -> list[float]:
    """Return random values 1 (right) and 0 (wrong)."""
    return [float(right) for right in np.random.default_rng(seed).random(count) < accuracy]


def together(*tasks: TaskResult) -> TaskResults:
    """Return one model's results."""
    return TaskResults(tasks=tasks)


def worse(values: list[float], share: float) -> list[float]:
    """Return the values with this share of the right answers turned wrong."""
    rights = [place for place, value in enumerate(values) if value]
    lost = set(rights[: round(share * len(rights))])
    return [0.0 if place in lost else value for place, value in enumerate(values)]
