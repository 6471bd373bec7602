"""The objects that every step of a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmprune.pipeline.batches import Batches
from llmprune.pipeline.inputs import RunInputs
from llmprune.planning.duration.estimate import Durations
from llmprune.planning.plan import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.results.report_schema import Report
from llmprune.results.run_folder import RunFolder


@dataclass(frozen=True)
class EarlierRounds:
    """Recipe and plan of a run of several rounds, and the reports of those before the last."""

    recipe: Recipe
    plan: Plan
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class RunContext:
    """Recipe, plan, inputs, run folder and batch sizes of one run.

    ``durations``: estimates of its parts, in the first process. ``earlier``: rounds before this one, whose recipe and
    plan are those of the last round. ``predictions``: folder for the dense model's predictions that rounds share.
    """

    recipe: Recipe
    plan: Plan
    inputs: RunInputs
    folder: RunFolder
    batches: Batches
    durations: Durations | None = None
    earlier: EarlierRounds | None = None
    predictions: Path | None = None

    @property
    def whole_recipe(self) -> Recipe:
        """The recipe of the whole run, with the model of its first round."""
        return self.earlier.recipe if self.earlier else self.recipe

    @property
    def whole_plan(self) -> Plan:
        """The plan of the whole run."""
        return self.earlier.plan if self.earlier else self.plan
