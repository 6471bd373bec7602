"""Outcome for each layer of the dense model: what is kept of it, its repair, its training, its sparsity."""

from __future__ import annotations

from llmprune.results.figures.base import Figures


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
