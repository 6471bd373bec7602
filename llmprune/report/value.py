"""What a run found out, as one value: ``report.json`` is this, and the HTML page draws it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 1


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
    score_share: float | None  # share of the layer's neuron scores that the kept neurons hold
    error_cut: float | None  # relative error of the hidden states after the layer, before its refit
    error_refit: float | None  # the same after its refit
    ridge: float | None = None  # of its refit; None where no refit helped on calibration text held out from it
    inherited: float | None = None  # share of the error of earlier layers that the refit goes after
    held_out: float | None = None  # relative change of the squared error on calibration text held out from the refit


class PerplexityFigures(Figures):
    """Perplexity on held-out text of the dense model, of the cut alone, and of the result."""

    dense: float
    cut: float | None  # None where nothing was refit: then ``pruned`` is the cut alone
    pruned: float
    tokens: int
    source: str


class TaskFigures(Figures):
    """One lm-eval task, dense against pruned on the same samples."""

    task: str
    metric: str
    dense: float
    pruned: float
    retention: float | None  # pruned / dense, inverted where lower is better; None where it would divide by 0
    samples: int
    lost: int | None  # samples right before and wrong after; None where the metric is not 0/1
    gained: int | None


class SpeedFigures(Figures):
    """Generation speed in tokens per second: medians of runs in turn in one process."""

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


class GateFigures(Figures):
    """The bar and whether it was cleared."""

    min_retention: float
    retention: float
    passed: bool


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
    seed: int
    trust_remote_code: bool
    device: str
    processes: int
    versions: dict[str, str]


class Report(Figures):
    """The whole report of one run."""

    schema_version: int = SCHEMA_VERSION
    created: str
    recipe: dict[str, Any]
    recipe_text: str
    overrides: tuple[str, ...]
    provenance: Provenance
    dense: Size
    pruned: Size
    layers: tuple[LayerFigures, ...]
    perplexity: PerplexityFigures | None
    tasks: tuple[TaskFigures, ...]
    mean_retention: float | None
    speed: SpeedFigures | None
    gate: GateFigures | None
    verification: VerificationFigures
    steps: tuple[Step, ...]
    warnings: tuple[str, ...]
    files: dict[str, str]
