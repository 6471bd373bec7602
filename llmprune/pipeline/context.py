"""The objects that every step of a run works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.pipeline.batches import Batches
from llmprune.pipeline.inputs import RunInputs
from llmprune.planning.duration.estimate import Durations
from llmprune.planning.plan_schema import Plan
from llmprune.planning.vocabulary.choice import vocabulary_sources
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.text_source import TextSource
from llmprune.results.figures.search import SearchFigures
from llmprune.results.report_schema import Report
from llmprune.results.run_folder.folder import RunFolder
from llmprune.score.inputs import ScoringCriteria
from llmprune.score.scores import Scores


@dataclass(frozen=True)
class EarlierRounds:
    """Recipe and plan of a run of several rounds, and the reports of those before the last."""

    recipe: Recipe
    plan: Plan
    reports: tuple[Report, ...]


@dataclass(frozen=True)
class AmongRounds:
    """Place of one of several rounds: the layers of the first dense model that it begins with.

    ``predictions``: folder for the dense model's predictions that all rounds share.
    """

    layers: tuple[int, ...]
    predictions: Path

    def kept(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the indices in the first dense model of layers that a cut of this round keeps."""
        return tuple(self.layers[index] for index in layers)


@dataclass(frozen=True)
class Search:
    """Search of a run whose recipe has a budget.

    ``criteria``: of pass 1, which scores every axis at once. ``judged_N``: numbers of the calibration windows that the
    scores do not see, on which shapes are judged. ``scores``, ``figures``: its results, once they are there.
    ``member``: index of the budget that this run is for.
    """

    criteria: ScoringCriteria
    judged_N: Tensor
    scores: Scores | None = None
    figures: SearchFigures | None = None
    member: int = 0

    @property
    def reason(self) -> dict[str, Any] | None:
        """The choice of this run's shape in a few figures, for ``cut.json``; None before it is made."""
        if self.figures is None:
            return None
        chosen, shape = self.figures.chosen[self.member], self.figures.chosen_shape(self.member)
        return {
            "budget": chosen.limits,
            "shape": chosen.name,
            "tried": chosen.tried,
            "divergence": shape.divergence,
            "score": shape.score,
        }

    @property
    def reported(self) -> SearchFigures | None:
        """The figures as the report of this run has them: in a family they name the member."""
        if self.figures is None or len(self.figures.chosen) < 2:
            return self.figures
        return self.figures.model_copy(update={"member": self.member})


@dataclass(frozen=True)
class RunContext:
    """Recipe, plan, inputs, run folder and batch sizes of one run.

    ``durations``: estimates of its parts, in the first process. ``end_recovery``: the training makes no more steps.
    ``among``: of a run that is one of several rounds; ``earlier``: of the last round, whose recipe and plan are here.
    ``search``: where the recipe has a budget.
    """

    recipe: Recipe
    plan: Plan
    inputs: RunInputs
    folder: RunFolder
    batches: Batches
    durations: Durations | None = None
    end_recovery: bool = False
    among: AmongRounds | None = None
    earlier: EarlierRounds | None = None
    search: Search | None = None

    @property
    def whole_recipe(self) -> Recipe:
        """The recipe of the whole run, with the model of its first round."""
        return self.earlier.recipe if self.earlier else self.recipe

    @property
    def vocabulary_sources(self) -> tuple[TextSource, ...]:
        """Sources of the text that the vocabulary is kept for."""
        return vocabulary_sources(self.recipe)

    @property
    def whole_plan(self) -> Plan:
        """The plan of the whole run."""
        return self.earlier.plan if self.earlier else self.plan
