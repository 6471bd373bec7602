"""Results of lm-eval tasks made by hand."""

from __future__ import annotations

import numpy as np

from llmprune.evaluation.lm_eval.results import Sample, TaskResult


def result(*values: float | None, task: str = "t", answers: str = "", **changes: object) -> TaskResult:
    """A task whose documents have these values; ``answers`` makes them another model's."""
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
    """So many right and wrong answers."""
    return [float(right) for right in np.random.default_rng(seed).random(count) < accuracy]
