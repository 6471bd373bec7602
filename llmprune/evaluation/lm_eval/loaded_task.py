"""An lm-eval task with its data, and its place in the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmprune.recipe.evaluation import Evaluation


@dataclass(frozen=True)
class LoadedTask:
    """lm-eval task with its data."""

    name: str
    task: Any
    group: str | None  # group in the recipe that includes this task
    named: str  # in the recipe: the task, or a group or tag that includes it

    def limit(self, evaluation: Evaluation) -> int | None:
        """Return the maximum number of samples; None: all."""
        return evaluation.limit_of(self.named)
