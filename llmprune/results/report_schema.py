"""The result of a run as one value: ``report.json`` is its JSON, and tables, pages and model cards display it."""

from __future__ import annotations

from typing import Any

from llmprune.results.figures.base import SCHEMA_VERSION, Figures
from llmprune.results.figures.evaluation import (
    DivergenceFigures,
    GateFigures,
    GenerationFigures,
    PerplexityFigures,
    RetentionFigures,
    SpeedFigures,
    TaskFigures,
)
from llmprune.results.figures.layers import LayerFigures, SparsityFigures
from llmprune.results.figures.lineage import Ancestor
from llmprune.results.figures.model_size import Size
from llmprune.results.figures.next_tools import NextTools
from llmprune.results.figures.prediction_heads import PredictionHeads
from llmprune.results.figures.provenance import Provenance, Step
from llmprune.results.figures.recovery import RecoveryFigures, RecoveryScores
from llmprune.results.figures.result_files import BaseFiles, GgufFigures, RequantizedFigures, VerificationFigures
from llmprune.results.figures.rounds import RoundFigures
from llmprune.results.figures.search import SearchFigures
from llmprune.results.figures.stability import SourceFigures, StabilityFigures
from llmprune.results.figures.vocabulary import VocabularyFigures
from llmprune.results.notebook.inline_report import inline_report, rows_of_quality, rows_of_sizes, rows_of_tasks


class Report(Figures):
    """The whole report of one run: ``report.json``.

    ``schema_version`` counts up when a field is renamed, removed or changes its meaning; new fields may appear without
    a new version. 2: intervals, groups, verdicts in words, divergence and free generation. 3: ``mixer_held_out`` of
    layers in place of ``heads_held_out``. 4: ``minimum`` and ``measured`` of a bar in place of ``min_retention`` and
    ``retention``, because it may be about greedy agreement.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    recipe: dict[str, Any]
    recipe_text: str
    overrides: tuple[str, ...]
    provenance: Provenance
    dense: Size
    pruned: Size
    lineage: tuple[Ancestor, ...] = ()  # models from the first base to the one that this run pruned
    layers: tuple[LayerFigures, ...]
    stability: StabilityFigures | None = None  # with --calibration-check and one source of text
    sources: SourceFigures | None = None  # where scores are summed by source, or with --calibration-check
    vocabulary: VocabularyFigures | None = None
    sparsity: SparsityFigures | None = None
    search: SearchFigures | None = None  # for the shape, under a budget
    recovery: RecoveryFigures | None = None  # training after the cut, in the last round
    rounds: tuple[RoundFigures, ...] = ()  # of cut and training, where there are several
    recovery_scores: RecoveryScores | None = None
    perplexity: PerplexityFigures | None
    divergence: DivergenceFigures | None = None
    tasks: tuple[TaskFigures, ...]
    groups: tuple[TaskFigures, ...] = ()  # each group named in the recipe, over the documents of all its tasks
    mean_retention: float | None
    retention: RetentionFigures | None = None  # the mean with its interval
    generation: GenerationFigures | None = None
    speed: SpeedFigures | None
    gate: GateFigures | None
    verification: VerificationFigures
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    prediction_heads: PredictionHeads | None = None  # of the base's files
    next_tools: NextTools | None = None  # that the pruned model's shape allows
    base_files: BaseFiles = BaseFiles()
    gguf: tuple[GgufFigures, ...] = ()
    requantized: RequantizedFigures | None = None
    files: dict[str, str]

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        rows = [
            *rows_of_sizes(self.dense, self.pruned),
            *rows_of_quality(self.perplexity, self.speed, mean=self.mean_retention, retention=self.retention),
            *rows_of_tasks((*self.groups, *self.tasks)),
        ]
        return inline_report(self.provenance.model, rows, gate=self.gate, warnings=self.warnings)

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Indices of the removed layers in the dense model."""
        return tuple(layer.layer for layer in self.layers if layer.removed)

    @property
    def trained_tokens(self) -> int | None:
        """Tokens that the model was trained on, in all rounds; None without a training."""
        if self.recovery is None:
            return None
        return sum(one.tokens for one in self.rounds) or self.recovery.tokens

    @property
    def measures_quality(self) -> bool:
        """Check that the quality of the pruned model was measured: by tasks, perplexity or greedy agreement."""
        measured = self.vocabulary is not None and self.vocabulary.bits_per_byte is not None
        return measured or bool(self.tasks) or self.perplexity is not None or self.generation is not None
