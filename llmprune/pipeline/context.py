"""The objects that every step of a run works with."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.pipeline.batches import Batches
from llmprune.pipeline.inputs import RunInputs
from llmprune.planning.duration.estimate import Durations
from llmprune.planning.plan import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.results.run_folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """Recipe, plan, inputs, run folder and batch sizes of one run.

    ``durations``: estimates of its parts, in the first process. ``end_recovery``: the training makes no more steps.
    """

    recipe: Recipe
    plan: Plan
    inputs: RunInputs
    folder: RunFolder
    batches: Batches
    durations: Durations | None = None
    end_recovery: bool = False
