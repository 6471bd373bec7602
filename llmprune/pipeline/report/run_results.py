"""Results of the steps of a run, from which its report is composed."""

from __future__ import annotations

from dataclasses import dataclass

from llmprune.evaluation.evaluate import Measured
from llmprune.pipeline.prune_checkpoint import PrunedCheckpoint
from llmprune.pipeline.score_and_select import ChosenCut
from llmprune.results.figures.recovery import RecoveryFigures
from llmprune.results.figures.stability import SourceFigures, StabilityFigures
from llmprune.results.figures.vocabulary import VocabularyFigures
from llmprune.score.scores import Scores


@dataclass(frozen=True)
class RunResults:
    """Results of the steps of a run."""

    scores: Scores | None
    chosen: ChosenCut
    stability: StabilityFigures | None
    sources: SourceFigures | None
    pruned: PrunedCheckpoint
    measured: Measured
    recovery: RecoveryFigures | None = None
    vocabulary: VocabularyFigures | None = None
