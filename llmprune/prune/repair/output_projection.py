"""Refit of the output projection that ends a layer: of its MLP, or without one the last projection that writes.

The regression target has two parts (``cross_validated_ridge``):

    lost:        what the cut and the removed layers after it took from the layer's output
    inherited:   the error of the hidden states that earlier layers left

Shapes: B batch, L sequence length, D hidden size, K inputs of the projection kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from llmprune.anatomy.types import Unit
from llmprune.common.distributed import sum_over_processes
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.relative_error import RelativeError
from llmprune.prune.repair.activations import (
    LayerActivations,
    run_both,
    run_uncut,
)
from llmprune.prune.repair.base import Stage


@dataclass(frozen=True)
class _Missing:
    """Regression targets of one batch: the error that this layer's cut caused, and that of earlier layers."""

    lost_BLD: Tensor
    inherited_BLD: Tensor


class OutputProjectionRefit:
    """Ridge regression of the layer's output projection towards the dense hidden states after the layer and its gap."""

    stage = Stage.AFTER_GAP

    def apply(self, run: Pass2Context, work: LayerWork) -> None:
        """Refit the projection on the cut layer's activations."""
        unit = work.dense.unit
        if unit is None or not work.step.refits_output:
            return
        equations, error = run.make_equations(), RelativeError()
        with _activations(run, work, unit=unit) as activations:
            for one in activations:
                target_BLD = run.dense.hidden_states.at(one.batch, one.uncut_BLD.device)
                error.update(target_BLD - one.cut_BLD, target_BLD)
                missing = _missing(work, one, unit=unit, target_BLD=target_BLD)
                parts = run.folds.parts(one.batch, one.input_BLK, missing.lost_BLD, missing.inherited_BLD)
                for fold, (input_TK, lost_TD, inherited_TD) in parts:
                    equations.update(input_TK, lost_TD, inherited_TD=inherited_TD, fold=fold)
        sum_over_processes([*equations.reducible_state(), *error.reducible_state()])
        repair = work.outcome.output = equations.solve(f"layer {work.step.old}, {unit.output}")
        if work.outcome.error_cut is None:  # else the refit of the up projection measured it
            work.outcome.error_cut = error.value()
        if repair.delta_DF is not None:
            work.weights.add_to_projection(unit.tensors[-1], repair.delta_DF)


@contextmanager
def _activations(run: Pass2Context, work: LayerWork, *, unit: Unit) -> Iterator[Iterator[LayerActivations]]:
    """Run the uncut layer alone where the cut layer's activations follow from its own, else both.

    They do not follow where more than neurons of the unit is cut, a norm follows the projection, or the up projection
    was refit. What that refit repaired of inherited errors then counts as lost by the cut, with the opposite sign.
    """
    step, up, scale = work.step, work.outcome.up, work.dense.scale
    is_up_refit = up is not None and up.delta_FI is not None
    with run.dense.decoder.layer(step.old, work.weights.uncut) as uncut:
        if scale is not None and step.cuts_only(unit) and not is_up_refit:
            keep_K = run.cut.neurons.get(step.key(unit))
            yield run_uncut(work.runs, step.new, uncut=uncut, unit=unit, keep_K=keep_K, scale=scale)
            return
        with run.pruned.decoder.layer(step.new, work.weights.cut) as cut:
            yield run_both(work.runs, step.new, uncut=uncut, cut=cut, unit=unit)


def _missing(work: LayerWork, one: LayerActivations, *, unit: Unit, target_BLD: Tensor) -> _Missing:
    device, scale = one.uncut_BLD.device, work.dense.scale
    before_gap_BLD = work.before_gap.at(one.batch, device)
    if scale is not None:
        return _Missing(
            lost_BLD=(one.uncut_BLD - one.cut_BLD + target_BLD - before_gap_BLD) / scale,
            inherited_BLD=(before_gap_BLD - one.uncut_BLD) / scale,
        )
    assert one.projection is not None, "both layers were run"
    # a norm follows the projection: match its own dense output instead
    return _Missing(
        lost_BLD=one.projection.uncut_BLD - one.projection.cut_BLD,
        inherited_BLD=work.dense.outputs[unit.output].at(one.batch, device) - one.projection.uncut_BLD,
    )
