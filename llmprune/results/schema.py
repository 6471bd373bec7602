"""What a run found out, as one value: ``report.json`` is this, and the HTML page draws it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 3

Verdict = Literal["pass", "fail", "not enough samples", "no interval"]


class Figures(BaseModel):
    """A frozen part of the report."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Size(Figures):
    """How large a model is."""

    parameters: int
    bytes: int  # of the weights, in the dtype that they are saved in
    layers: int
    widths: dict[str, int]  # neurons of an MLP, by the config field that sets it; empty where none could be found
    experts: int | None  # in each mixture; None where there is none
    kv_groups: int | None = None  # of attention heads, in each layer; None where the config counts none
    kv_bytes_per_token: int | None  # key-value cache of one token; None where it could not be found out


class MatrixFigures(Figures):
    """One matrix that was made sparse, by its name in the layer."""

    name: str
    kept: float  # share of its weights that are not zero
    error: float | None  # relative, of what it writes against what all its weights would; None where not measured


class SparsityFigures(Figures):
    """What the saved file holds, counted in it."""

    pattern: str
    method: str
    matrices: int
    weights: int  # of these matrices
    zeros: int
    groups: int  # of M neighbouring inputs, all looked at; 0 without groups
    violations: int  # groups that break the pattern: none, or the run fails
    skipped: tuple[str, ...]  # what the recipe means and stays dense, and why


class LayerFigures(Figures):
    """What happened to one layer of the dense model."""

    layer: int
    importance: float | None  # by the depth criterion; None where layers were not scored
    removed: bool
    width: int | None  # MLP neurons before, of all MLPs and experts of the layer
    kept: int | None  # MLP neurons after; None for a removed layer
    experts_kept: tuple[int, ...] | None = None  # indices of the experts that stay, where some go
    kv_groups_kept: tuple[int, ...] | None = None  # indices of the groups of heads that stay, where some go
    kv_groups_share: float | None = None  # share of the layer's scores of heads that these hold
    score_share: float | None  # share of the layer's neuron scores that the kept neurons hold (``kept_share``)
    error_cut: float | None  # relative error of the hidden states after the layer, cut but before its own refit
    error_refit: float | None  # the same as it is saved
    ridge: float | None = None  # of its refit; None where no refit helped on calibration text held out from it
    inherited: float | None = None  # share of the error of earlier layers that the refit goes after
    held_out: float | None = None  # relative change of the squared error on calibration text held out from this refit
    mixer_held_out: float | None = None  # the same of the hidden states behind the token mixer, by its refit
    up_held_out: float | None = None  # of the layer's output, by the refit of the up projection, on every eighth window
    matrices: tuple[MatrixFigures, ...] = ()  # those that were made sparse


class Overlap(Figures):
    """Of what one half of the calibration removes, the share that the other half removes too."""

    mean: float  # over the layers
    least: float
    by_chance: float  # what a choice without any reason would have


class StabilityFigures(Figures):
    """What two halves of the calibration text choose, each by itself. None where there was no choice."""

    windows: tuple[int, int]
    removed_layers: tuple[tuple[int, ...], tuple[int, ...]]
    layers: Overlap | None
    neurons: Overlap | None
    heads: Overlap | None  # key-value groups of attention heads
    experts: Overlap | None


class PerplexityFigures(Figures):
    """Perplexity on held-out text of the dense model, of the cut alone, and of the result."""

    dense: float
    cut: float | None  # None where nothing was refit: then ``pruned`` is the cut alone
    pruned: float
    tokens: int
    source: str


class DivergenceFigures(Figures):
    """KL divergence of the pruned model's next-token distributions from the dense one's, on the held-out text."""

    mean: float  # nats a token
    quantiles: dict[str, float]  # by share of the tokens below: 0.5, 0.9, 0.99, 1
    same_first: float  # share of the tokens where both put the same token first
    tokens: int


class Interval(Figures):
    """Where a figure lies, with this confidence."""

    low: float
    high: float
    confidence: float


class Example(Figures):
    """What both models wrote after the same prompt."""

    prompt: str
    dense: str
    pruned: str


class TaskFigures(Figures):
    """One lm-eval task, or a group of them together, dense against pruned on the same samples."""

    task: str
    group: str | None = None  # the group of the recipe that it came with
    metric: str
    filter: str = "none"
    higher_is_better: bool = True
    dense: float
    pruned: float
    retention: float | None  # pruned / dense, inverted where lower is better; None where it would divide by 0
    interval: Interval | None = None  # of the retention; None where the metric is no mean over samples
    samples: int
    documents: int | None = None  # that the task has in all
    lost: int | None  # samples right before and wrong after, in the metric's direction; None where it is not 0/1
    gained: int | None
    p_value: float | None = None  # McNemar's, exact; None where the metric is not 0/1
    identical: bool = False  # every answer is the same to the last bit
    examples: tuple[Example, ...] = ()  # of generative tasks


class RetentionFigures(Figures):
    """The unweighted mean retention over tasks, a group in place of its tasks."""

    retention: float
    interval: Interval
    counted: tuple[str, ...]  # tasks and groups in the mean
    left_out: tuple[str, ...]  # those without an interval
    samples: int


class FreeText(Figures):
    """How one model writes when it may write on: means over the prompts."""

    repetition: float  # share of the tokens that end a sequence of four that was there before
    loops: float  # share of the texts that end in a loop
    empty: float  # share of the texts without a letter
    tokens: float  # length of a text, at its end token or cut off


class GenerationFigures(Figures):
    """Free greedy generation after the same prompts; ``text``: how the held-out text itself goes on."""

    dense: FreeText
    pruned: FreeText
    text: FreeText
    samples: int
    prompt_tokens: int
    new_tokens: int
    examples: tuple[Example, ...]


class SpeedFigures(Figures):
    """Generation speed in tokens per second: medians of runs in turn in one process.

    The factor that people are shown is that of these medians (``wording.speedup``). It lies between ``ratio_low`` and
    ``ratio_high``.
    """

    dense: float
    pruned: float
    ratio: float  # median of pruned / dense, pair by pair
    ratio_low: float  # least and most over the pairs
    ratio_high: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str


class Spread(Figures):
    """A median with its quartiles; of fewer than four values with the least and the most."""

    median: float
    low: float
    high: float


class Pair(Figures):
    """The same figure of both models, and of model / base pair by pair."""

    base: Spread
    model: Spread
    ratio: Spread


class BenchPoint(Figures):
    """One batch size and one context length."""

    batch_size: int
    context: int  # tokens of each prompt
    first_token: Pair  # seconds from the call to the first new token
    prefill: Pair  # prompt tokens per second
    decode: Pair  # new tokens per second after the first
    peak: tuple[int, int]  # most bytes beyond the loaded models while generating: base, model


class BenchSize(Figures):
    """What a model weighs."""

    parameters: int
    weights: int  # bytes in memory, as measured with
    disk: int | None  # bytes of the weights' files; None where they are not in a folder
    kv_bytes_per_token: int | None
    decoded_bytes: int  # of weights that one decoded token reads; all experts of a mixture count
    joules: float  # estimate: DRAM energy of these, at 640 pJ per 32-bit word


class SparseProduct(Figures):
    """One shape of 2:4 matrix, multiplied dense and sparse."""

    outputs: int
    inputs: int
    matrices: int  # of this shape in the model
    tokens: int
    dense: float  # milliseconds
    sparse: float
    difference: float  # of the outputs, largest, relative to the largest output


class BenchFigures(Figures):
    """Two models timed in turn on one machine."""

    schema_version: int = SCHEMA_VERSION
    base: str
    model: str
    base_size: BenchSize
    model_size: BenchSize
    points: tuple[BenchPoint, ...]
    products: tuple[SparseProduct, ...] = ()  # with --sparse
    repeats: int
    new_tokens: int
    cache: str  # dynamic or static
    device: str
    dtype: str


class BarFigures(Figures):
    """One bar of the gate."""

    name: str  # of a task or group, or "mean"
    min_retention: float
    retention: float | None
    interval: Interval | None
    verdict: Verdict
    samples: int
    samples_needed: int | None = None  # about how many would tell, where there are not enough; None: no number would
    reason: str | None = None  # why there is no interval


class GateFigures(Figures):
    """The bars and whether all were cleared: ``min_retention`` and ``retention`` are those of the mean."""

    min_retention: float
    retention: float | None  # None where no task has one
    passed: bool
    confidence: float
    verdict: Verdict
    bars: tuple[BarFigures, ...]


class VerificationFigures(Figures):
    """What a fresh process found when it loaded the checkpoint with plain transformers."""

    parameters: int
    largest_logit_difference: float  # between the run's own logits and the reloaded model's
    cached_generation_equal: bool
    positions: int  # token positions whose logits were compared


class Step(Figures):
    """One step of the run."""

    name: str
    seconds: float  # of the work itself, also where it was done in an earlier run
    reused: bool  # its product was there already and still valid
    tokens_per_second: float | None = None  # calibration tokens, where they went through the model
    bytes_read: int | None = None  # from disk; what the page cache had does not count
    peak_resident: int | None = None  # bytes of memory, mapped files included
    peak_device: int | None = None  # bytes on the GPU
    forward_ratio: float | None = None  # seconds / those of a plain forward pass, with --measure-forward


class Provenance(Figures):
    """What the result came from."""

    model: str
    revision: str | None
    commit: str | None
    calibration_fingerprint: str | None
    calibration_tokens: int | None
    calibration_crossings: int | None = None  # windows with parts of several documents; None of ready tokens
    datasets: dict[str, str] = {}  # the commit of each hub data set that was read
    seed: int
    trust_remote_code: bool
    device: str
    processes: int
    versions: dict[str, str]


class BaseFiles(Figures):
    """Files of the base beside its weights: those that came along byte for byte, and why others did not."""

    carried: tuple[str, ...] = ()
    left: dict[str, str] = {}  # reason, by path


class Report(Figures):
    """The whole report of one run: ``report.json``.

    ``schema_version`` counts up when a field is renamed, removed or changes its meaning; new fields may appear in
    between. 2: intervals, groups, verdicts in words, divergence and free generation. 3: ``mixer_held_out`` of layers in
    place of ``heads_held_out``.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    recipe: dict[str, Any]
    recipe_text: str
    overrides: tuple[str, ...]
    provenance: Provenance
    dense: Size
    pruned: Size
    layers: tuple[LayerFigures, ...]
    stability: StabilityFigures | None = None  # where --calibration-check asked for it
    sparsity: SparsityFigures | None = None
    perplexity: PerplexityFigures | None
    divergence: DivergenceFigures | None = None
    tasks: tuple[TaskFigures, ...]
    groups: tuple[TaskFigures, ...] = ()  # each group that the recipe named, its documents together
    mean_retention: float | None
    retention: RetentionFigures | None = None  # the mean with its interval
    generation: GenerationFigures | None = None
    speed: SpeedFigures | None
    gate: GateFigures | None
    verification: VerificationFigures
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    base_files: BaseFiles = BaseFiles()
    files: dict[str, str]

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Indices of the dense model's layers that went."""
        return tuple(layer.layer for layer in self.layers if layer.removed)

    @property
    def measures_quality(self) -> bool:
        """Whether anything says how good the pruned model is: tasks or perplexity."""
        return bool(self.tasks) or self.perplexity is not None
