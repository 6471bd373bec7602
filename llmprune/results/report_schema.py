"""The result of a run as one value: ``report.json`` is its JSON, and tables, pages and model cards display it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmprune.results.calibration_sources import CalibrationSource
from llmprune.results.evaluation_figures import (
    DivergenceFigures,
    GateFigures,
    GenerationFigures,
    PerplexityFigures,
    RetentionFigures,
    SpeedFigures,
    TaskFigures,
)
from llmprune.results.figures import SCHEMA_VERSION, Figures
from llmprune.results.inline_report import inline_report
from llmprune.results.lineage import Ancestor
from llmprune.results.next_tools import NextTools
from llmprune.results.prediction_heads import PredictionHeads
from llmprune.results.recovery_figures import RecoveryFigures, RecoveryScores
from llmprune.results.search_figures import SearchFigures
from llmprune.results.vocabulary_figures import VocabularyFigures


class Size(Figures):
    """Size of a model."""

    parameters: int
    bytes: int  # of the weights, in the dtype that they are saved in
    layers: int
    widths: dict[str, int]  # neurons of an MLP, by the config field that sets it; empty if none was found
    experts: int | None  # in each mixture; None without mixtures
    kv_groups: int | None = None  # key-value groups of each layer; None if the config does not count them
    hidden: int | None = None  # channels of the residual stream
    vocabulary: int | None = None  # tokens; None where the run cuts none
    kv_bytes_per_token: int | None  # key-value cache of one token; None if unknown


class MatrixFigures(Figures):
    """Sparsity of one matrix."""

    name: str  # within the layer
    kept: float  # share of its weights that are not zero
    error: float | None  # relative error of its output against the dense matrix; None if not measured
    permuted: bool = False  # its inputs are in another order than the dense model's


class SparsityFigures(Figures):
    """Sparsity of the saved weights, counted in the file."""

    pattern: str
    method: str
    matrices: int
    weights: int  # of these matrices
    zeros: int
    groups: int  # groups of M adjacent inputs, all checked; 0 if the pattern has no groups
    violations: int  # groups that break the pattern: 0, or the run fails
    skipped: tuple[str, ...]  # matrices that the recipe selects and that remain dense, with the reason
    permuted: int = 0  # matrices whose inputs are in another order than the dense model's


class BlockFigures(Figures):
    """Training of one layer: relative error of its output on held-out windows, before it and with the weights kept."""

    before: float
    after: float
    steps: int | None  # of the weights kept; 0: those of the closed form, None: the layer cannot be differentiated


class LayerFigures(Figures):
    """Outcome for one layer of the dense model."""

    layer: int
    importance: float | None  # by the depth criterion; None if layers were not scored
    removed: bool
    width: int | None  # MLP neurons before the cut, of all MLPs and experts of the layer
    kept: int | None  # MLP neurons after the cut; None for a removed layer
    experts_kept: tuple[int, ...] | None = None  # indices of the kept experts, if any were removed
    kv_groups_kept: tuple[int, ...] | None = None  # indices of the kept key-value groups, if any were removed
    kv_groups_share: float | None = None  # share of the layer's head scores in the kept groups
    score_share: float | None  # share of the layer's neuron scores in the kept neurons (``kept_share``); None for ranks
    error_cut: float | None  # relative error of the hidden states after the layer, cut but before its own refit
    error_refit: float | None  # relative error of the hidden states after the layer as saved
    ridge: float | None = None  # of its refit; None if no refit reduced the error on the calibration fold
    inherited: float | None = None  # share of the error of earlier layers in the refit's target
    held_out: float | None = None  # relative change of the squared error on the calibration fold, by this refit
    mixer_held_out: float | None = None  # as held_out, for the hidden states after the token mixer, by its refit
    up_held_out: float | None = None  # for the layer output, by the up projection's refit, on every eighth window
    block: BlockFigures | None = None  # its training after the closed form
    matrices: tuple[MatrixFigures, ...] = ()  # sparse matrices


class Overlap(Figures):
    """Share of one calibration half's removals that the other half removes too."""

    mean: float  # over the layers
    least: float  # minimum over the layers
    by_chance: float  # expected for random choices


class StabilityFigures(Figures):
    """Agreement of the cuts chosen on two halves of the calibration text. None where nothing was chosen."""

    windows: tuple[int, int]
    removed_layers: tuple[tuple[int, ...], tuple[int, ...]]
    layers: Overlap | None
    neurons: Overlap | None
    heads: Overlap | None  # key-value groups
    experts: Overlap | None


class SourceFigures(Figures):
    """Cuts that the sources of the calibration text would choose, each alone.

    ``neurons``, ``heads`` and ``experts``: by layer of the dense model, the share of the kept ones that every source
    would keep; None for a layer that lost none. Empty where the run cuts none.
    """

    names: tuple[str, ...]
    windows: tuple[int, ...]  # of each source
    removed_layers: tuple[tuple[int, ...], ...]  # by each source; empty where layers have no scores by source
    neurons: tuple[float | None, ...]
    heads: tuple[float | None, ...]  # key-value groups
    experts: tuple[float | None, ...]


class VerificationFigures(Figures):
    """Comparison of the run's model with the checkpoint that plain transformers loaded in a fresh process."""

    parameters: int
    largest_logit_difference: float  # between the run's own logits and the reloaded model's
    cached_generation_equal: bool
    positions: int  # token positions whose logits were compared


class RoundFigures(Figures):
    """Outcome of one round of cut and training."""

    size: Size
    removed_layers: tuple[int, ...]  # in this round, by their indices in the first dense model
    tokens: int  # trained on
    before: float  # mean held-out divergence of the repaired weights, in nats per token
    after: float  # of the weights that were saved
    seconds: float  # of the training


class Step(Figures):
    """Cost of one step of the run."""

    name: str
    seconds: float  # of the computation, also if an earlier run did it
    reused: bool  # an earlier run's product was still valid
    estimated_seconds: float | None = None  # by the plan, for the device and processes of the run; None if unknown
    tokens_per_second: float | None = None  # calibration tokens, if the step runs the model on them
    seconds_waited: float | None = None  # for layers to be read from the disk, in steps that run them
    bytes_read: int | None = None  # from disk, without reads from the page cache
    peak_resident: int | None = None  # bytes of memory, mapped files included
    peak_device: int | None = None  # bytes on the GPU where they are most
    forward_ratio: float | None = None  # seconds / seconds of a plain forward pass, with --measure-forward


class Provenance(Figures):
    """Inputs and environment of the run."""

    model: str
    adapter_base: str | None = None  # that the model, an adapter, was merged into
    revision: str | None
    commit: str | None
    quantization: str | None = None  # of the base's weights, which were dequantized
    calibration_fingerprint: str | None
    calibration_tokens: int | None
    calibration_crossings: int | None = None  # windows with parts of several documents; None for ready-made tokens
    calibration_sources: tuple[CalibrationSource, ...] = ()
    begin_of_text: str | None = None  # that the calibration windows begin with, as ``<bos> (2)``
    datasets: dict[str, str] = Field({})  # commit of each hub dataset that was read
    seed: int
    trust_remote_code: bool
    device: str
    processes: int
    batch_size: int | None = None  # calibration windows that a layer processed at a time
    versions: dict[str, str]


class BaseFiles(Figures):
    """Files of the base model other than weights: copied byte for byte, or not copied for a reason."""

    carried: tuple[str, ...] = ()
    left: dict[str, str] = Field({})  # reason, by path
    rewritten: tuple[str, ...] = ()  # for fewer tokens


class GgufFigures(Figures):
    """One exported GGUF file."""

    kind: str  # as llama.cpp names it
    file: str  # path within the run folder
    bytes: int


class RequantizedFigures(Figures):
    """The result in its base's quantized format, in the folder ``quantized``."""

    format: str
    weights: int  # that are quantized
    bytes: int
    divergence: float  # KL divergence from the unquantized result in nats per token, on calibration text


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
        return inline_report(self)

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
