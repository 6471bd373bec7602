"""Figures of pass 2, layer by layer, as ``report.json`` and the snapshots hold them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class MatrixRecord:
    """A sparse matrix: the share of its weights that are kept, and the relative error of its output.

    ``error``: against the output with all its weights, on the calibration text; None if the sparsity method computes no
    XᵀX to measure it with. ``permuted``: its inputs are in another order than the dense model's.
    """

    name: str
    kept: float
    error: float | None
    permuted: bool = False


@dataclass(frozen=True)
class BlockRecord:
    """Training of a layer: relative error of its output on held-out windows, before it and with the weights kept.

    ``steps``: those after which the weights were kept; 0 where no later ones were better than the closed form, None
    for a layer that cannot be differentiated.
    """

    before: float
    after: float
    steps: int | None


@dataclass(frozen=True)
class ExpertsRecord:
    """Refit of routed experts: how many were changed, and how many have too few tokens for it.

    ``held_out``: mean over the others of the relative change of the squared error on held-out folds; None without any.
    """

    refit: int
    few_tokens: int
    held_out: float | None


@dataclass(frozen=True)
class LayerRecord:
    """Relative error of the hidden states after a kept layer (and its gap), before and after its refit.

    ``ridge``, ``inherited`` and ``held_out`` are those of the output projection's ``Repair``; without a ridge the
    projection was not changed. ``error_cut`` is None where dense hidden states were not needed, or where only the token
    mixer was refit; the refit of the token mixer precedes both errors.
    """

    layer: int
    error_cut: float | None
    error_refit: float | None
    ridge: float | None = None
    inherited: float | None = None
    held_out: float | None = None
    mixer_held_out: float | None = None  # of the token mixer's output projection, if it was refit
    up_held_out: float | None = None  # of the up projection, on other windows
    experts: ExpertsRecord | None = None  # of the routed experts, if they were refit
    block: BlockRecord | None = None  # of the training of the whole layer, if it was trained
    matrices: tuple[MatrixRecord, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerRecord:
        """Read back what ``dataclasses.asdict`` wrote to JSON."""
        block = values["block"] and BlockRecord(**values["block"])
        matrices = tuple(MatrixRecord(**one) for one in values["matrices"])
        experts = values["experts"] and ExpertsRecord(**values["experts"])
        return cls(**values | {"block": block, "experts": experts, "matrices": matrices})

    def with_narrow_error(self, error: float | None, *, repaired: bool) -> LayerRecord:
        """Return the record with the error of the layer without its removed channels; None: no channels are removed.

        ``repaired``: the error is that after all repairs.
        """
        if error is None:
            return self
        if not repaired:
            return replace(self, error_cut=error)
        return replace(self, error_cut=self.error_cut or None, error_refit=error)
