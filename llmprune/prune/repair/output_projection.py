"""Refit of the output projection that ends a layer: of its MLP, or without one the last projection that writes.

The regression target has two parts (``cross_validated_ridge``):

    lost:        what the cut and the removed layers after it took from the layer's output
    inherited:   the error of the hidden states that earlier layers left; where a norm follows the projection, only at
                 and behind removed layers (``following_norm``)

Shapes: B batch, L sequence length, D hidden size, K inputs of the projection kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.anatomy.selection import outputs_first
from llmprune.anatomy.types import Unit
from llmprune.common.distributed import sum_over_processes
from llmprune.common.linalg.cross_validated_ridge import NormalEquations
from llmprune.common.linalg.cut_equations import CutTokens
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.relative_error import RelativeError
from llmprune.prune.repair.activations import LayerActivations, removed_rows, run_both, run_cut
from llmprune.prune.repair.base import Stage


@dataclass(frozen=True)
class _Missing:
    """Inputs and targets of one batch: the error that this layer's cut caused, and that of earlier layers."""

    input_BLK: Tensor
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
        sums_of = _cut_sums if self.runs_once(work, unit) else _sums
        equations, error = sums_of(run, work, unit=unit)
        sum_over_processes([*equations.reducible_state(), *error.reducible_state()])
        repair = work.outcome.output = equations.solve(f"layer {work.step.old}, {unit.output}")
        if work.outcome.error_cut is None:  # else the refit of the up projection measured it
            work.outcome.error_cut = error.value()
        if repair.delta_DF is not None:
            work.weights.add_to_projection(unit.tensors[-1], repair.delta_DF)

    def runs_once(self, work: LayerWork, unit: Unit) -> bool:
        """Check that the cut layer's activations follow from those of the uncut layer alone.

        They do not follow where more than neurons of the unit is cut, a norm follows the projection, or the up
        projection or routed experts were refit. What those refits repaired of inherited errors then counts as lost by
        the cut, with the opposite sign.
        """
        up = work.outcome.up
        if work.outcome.has_new_experts:
            return False
        return work.dense.scale is not None and work.step.cuts_only(unit) and (up is None or up.delta_FI is None)


def _cut_sums(run: Pass2Context, work: LayerWork, *, unit: Unit) -> tuple[NormalEquations, RelativeError]:
    """Return the equations, and the error of the cut layer, from one run of the uncut layer."""
    step, scale, error, weight = work.step, work.dense.scale, RelativeError(), unit.tensors[-1]
    assert scale is not None, "no norm follows"
    assert run.refit is not None, "layers are refit only with refit in the recipe"
    keep_K = run.cut.neurons.get(step.key(unit))
    with (
        run.dense.decoder.layer(step.old, work.weights.uncut) as uncut,
        run.pruned.decoder.layer(step.new, work.weights.cut) as cut,
    ):
        _, removed_RD = removed_rows(outputs_first(uncut.get_parameter(weight.name), weight), keep_K)
        folds = run.folds
        equations = run.refit.make_cut_equations(folds.count, removed_RD=removed_RD, one_source=folds.one_source)
        for one in run_cut(work.runs, step.new, uncut=uncut, cut=cut, unit=unit, keep_K=keep_K):
            target_BLD = run.dense.hidden_states.at(one.batch, one.output_BLD.device)
            missing_BLD = target_BLD.float() - one.output_BLD.float()
            error.update(missing_BLD, target_BLD)
            work.runs.keep_input(unit.output, one.input_BLK)
            values = [one.input_BLK, one.removed_BLR, missing_BLD / scale]
            if step.gap:
                before_gap_BLD = work.before_gap.at(one.batch, target_BLD.device)
                values.append((target_BLD.float() - before_gap_BLD.float()) / scale)
            for fold, (kept_TK, removed_TR, error_TD, *gap) in folds.parts(one.batch, *values):
                tokens = CutTokens(kept_TK, removed_TR, error_TD, gap[0] if gap else None)
                equations.update_cut(tokens, fold=fold)
    return equations, error


def _sums(run: Pass2Context, work: LayerWork, *, unit: Unit) -> tuple[NormalEquations, RelativeError]:
    """Return the equations, and the error of the cut layer, from runs of the uncut and of the cut layer."""
    step, equations, error = work.step, run.make_equations(), RelativeError()
    with (
        run.dense.decoder.layer(step.old, work.weights.uncut) as uncut,
        run.pruned.decoder.layer(step.new, work.weights.cut) as cut,
    ):
        for one in run_both(work.runs, step.new, uncut=uncut, cut=cut, unit=unit):
            target_BLD = run.dense.hidden_states.at(one.batch, one.uncut_BLD.device)
            error.update(target_BLD - one.cut_BLD, target_BLD)
            work.runs.keep_input(unit.output, one.input_BLK)
            missing = _missing(work, one, unit=unit, target_BLD=target_BLD)
            parts = run.folds.parts(one.batch, missing.input_BLK, missing.lost_BLD, missing.inherited_BLD)
            for fold, (input_TK, lost_TD, inherited_TD) in parts:
                equations.update(input_TK, lost_TD, inherited_TD=inherited_TD, fold=fold)
    return equations, error


def _missing(work: LayerWork, one: LayerActivations, *, unit: Unit, target_BLD: Tensor) -> _Missing:
    device, scale = one.uncut_BLD.device, work.dense.scale
    before_gap_BLD = work.before_gap.at(one.batch, device)
    if scale is not None:
        return _Missing(
            one.input_BLK,
            lost_BLD=(one.uncut_BLD - one.cut_BLD + target_BLD - before_gap_BLD) / scale,
            inherited_BLD=(before_gap_BLD - one.uncut_BLD) / scale,
        )
    norm, cut_BLD, uncut_BLD = work.dense.norm, one.projection.cut_BLD, one.projection.uncut_BLD
    if norm is None:  # another norm follows the projection: match its own dense output instead
        dense_BLD = work.dense.outputs[unit.output].at(one.batch, device)
        return _Missing(one.input_BLK, lost_BLD=uncut_BLD - cut_BLD, inherited_BLD=dense_BLD - uncut_BLD)
    contribution_BLD = norm.contribution(cut_BLD)
    lost_BLD = norm.contribution(uncut_BLD) - contribution_BLD
    inherited_BLD = torch.zeros_like(lost_BLD)
    if work.step.is_beside_removed:
        inherited_BLD = norm.wanted(contribution_BLD, target_BLD.float() - one.cut_BLD.float()) - lost_BLD
    input_BLK = one.input_BLK * norm.token_factor(cut_BLD)
    return _Missing(input_BLK, norm.direction(lost_BLD), norm.direction(inherited_BLD))
