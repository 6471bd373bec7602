"""Refit of the output projection of a layer's token mixer: its attention, or the recurrence in its place.

The regression target has two parts:

    lost:        the outputs of the removed key-value groups
    inherited:   the error of the hidden states between token mixer and MLP, after removed layers

Where a norm follows the projection, both are in the unit of its contribution (``following_norm``).

The MLP is refit after it, on what is left. Where no heads and no earlier layers are removed, the token mixer is not
changed: with only neurons removed, the refit of the MLPs alone kept as much (SmolLM2 with three quarters of them).

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection, K of them kept, R removed, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from llmprune.anatomy.selection import outputs_first, rows_of
from llmprune.common.distributed import sum_over_processes
from llmprune.common.linalg.cross_validated_ridge import Repair
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.repair.activations import removed_rows
from llmprune.prune.repair.base import Stage
from llmprune.prune.repair.following_norm import FollowingNorm
from llmprune.prune.repair.residual_writers import ResidualWriter


@dataclass(frozen=True)
class _Solved:
    """Repair of the projection; its inputs, where they were kept, and the path of the module that it ends."""

    repair: Repair
    inputs: HiddenStates | None
    owner: str


@dataclass(frozen=True)
class _Written:
    """One batch of the uncut layer: hidden states before it, and output and kept inputs of the projection.

    ``lost_BLD``: the part of the output from removed inputs; None where none are removed.
    """

    hidden_BLD: Tensor
    output_BLD: Tensor
    input_BLK: Tensor
    lost_BLD: Tensor | None = None


class TokenMixerRefit:
    """Ridge regression of the token mixer's output projection towards the dense residual stream after it."""

    stage = Stage.BEFORE_GAP

    def apply(self, run: Pass2Context, work: LayerWork) -> None:
        """Refit the projection on the inputs that the uncut layer gets from the pruned hidden states.

        If none of its inputs are removed, the uncut layer gets the repair too: it is then valid for both.
        """
        mixer = work.dense.mixer
        if mixer is None:
            return
        attention = work.step.attention
        weight = attention.tensors[-1] if attention else mixer.unit.tensors[-1]
        keep_K: Tensor | None = None
        if attention is not None:
            size = work.weights.uncut[weight.name].shape[weight.dim]
            keep_K = rows_of(run.cut.heads[work.step.key(attention)], size, prunable=weight)
        solved = self._solve(run, work, mixer=mixer, keep_K=keep_K)
        if solved.repair.delta_DF is not None:
            norm, delta_DF = work.dense.mixer_norm, solved.repair.delta_DF
            work.weights.add_to_projection(weight, norm.for_projection(delta_DF) if norm else delta_DF)
            if keep_K is None:
                work.weights.uncut[weight.name] = work.weights.cut[weight.name]
        work.outcome.mixer = solved.repair
        if solved.inputs is not None:
            with run.dense.decoder.layer(work.step.old, work.weights.uncut) as layer:
                module = layer.get_submodule(mixer.name)
                work.runs.add_unchanged(solved.owner, module, inputs=solved.inputs, index=work.step.new)

    @staticmethod
    def _solve(run: Pass2Context, work: LayerWork, *, mixer: ResidualWriter, keep_K: Tensor | None) -> _Solved:
        """Solve for the projection; keep its inputs if its module is not run again for the cut layer."""
        step, topology, equations = work.step, work.dense.topology, run.make_equations()
        assert topology is not None, "it names the token mixer"
        owner = topology.order.owners.get(mixer.name)
        keep_inputs = owner is not None and owner.path in work.runs.unchanged
        with run.dense.decoder.layer(step.old, work.weights.uncut) as layer:
            module = layer.get_submodule(mixer.name)
            weight_DF = outputs_first(module.get_parameter("weight"), mixer.unit.tensors[-1])
            removed_R, weight_RD = removed_rows(weight_DF, keep_K)
            keep_K = None if keep_K is None else keep_K.to(weight_DF.device)
            staged = StagedLayer(run.pruned, step.new, layer=layer, order=topology.order)
            for batch, input_BLF in staged.inputs(mixer.name, keep=keep_inputs):
                hidden_BLD = run.pruned.hidden_states.at(batch, input_BLF.device)
                output_BLD = module(input_BLF).view_as(hidden_BLD)
                dense_BLD = work.dense.outputs[mixer.name].at(batch, output_BLD.device)
                input_BLF = input_BLF.view(*hidden_BLD.shape[:2], -1)
                written = _Written(hidden_BLD, output_BLD, input_BLF)
                if keep_K is not None:
                    lost_BLD = input_BLF[..., removed_R] @ weight_RD
                    written = replace(written, input_BLK=input_BLF[..., keep_K], lost_BLD=lost_BLD)
                parts = _parts(written, dense_BLD, mixer=mixer, norm=work.dense.mixer_norm)
                for fold, (input_TK, inherited_TD, *lost) in run.folds.parts(batch, *parts):
                    equations.update(input_TK, lost[0] if lost else None, inherited_TD=inherited_TD, fold=fold)
        if step.refits_output:
            del work.dense.outputs[mixer.name]  # for all windows, and no longer needed
        sum_over_processes(equations.reducible_state())
        repair = equations.solve(f"layer {step.old}, {mixer.name}")
        return _Solved(repair, staged.take_inputs(mixer.name), owner.path if owner else "")


def _parts(written: _Written, dense_BLD: Tensor, *, mixer: ResidualWriter, norm: FollowingNorm | None) -> list[Tensor]:
    """Return inputs, inherited and lost targets of the regression, the last only where inputs are removed.

    ``dense_BLD``: the dense residual stream after the token mixer, as it was recorded.
    """
    output_BLD, lost_BLD = written.output_BLD, written.lost_BLD
    if norm is None:
        inherited_BLD = dense_BLD.float() - mixer.residual_after(written.hidden_BLD, output_BLD).float()
        parts = [written.input_BLK, inherited_BLD]
        return parts if lost_BLD is None else [*parts, lost_BLD]
    cut_BLD = output_BLD if lost_BLD is None else output_BLD - lost_BLD
    contribution_BLD, input_BLK = norm.contribution(cut_BLD), written.input_BLK * norm.token_factor(cut_BLD)
    missing_BLD = dense_BLD.float() - norm.residual_after(written.hidden_BLD, cut_BLD)
    wanted_BLD = norm.wanted(contribution_BLD, missing_BLD)
    if lost_BLD is None:
        return [input_BLK, wanted_BLD]
    lost_BLD = norm.contribution(output_BLD) - contribution_BLD
    return [input_BLK, wanted_BLD - lost_BLD, lost_BLD]
