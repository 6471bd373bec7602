"""Refit of routed experts: each output projection by ridge regression over the tokens that its expert gets.

The layer's output lacks something at every token (``output_projection``): what the cut took, and the error that earlier
layers left. An expert e adds g_e(x) · W_e a_e(x), so the regression has the weighted activations g_e a_e as inputs. Of
the experts that are solved together each gets its share of the error by the squares of their weights,

    g_e² / Σ g²      over the experts of this pass that the token is routed to

which is the smallest change that corrects it. After each pass, what the solved experts add now is subtracted, and the
next ones get what remains. Passes bound the memory for normal equations too. Ridge and the fraction of the inherited
error are cross-validated for each expert; one that gains nothing on folds that its solve did not see keeps its weights,
and so does one with too few tokens.

Shapes: B batch, L sequence length, T tokens, D hidden size, E experts, F neurons of an expert, G folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.anatomy.selection import outputs_first
from llmprune.anatomy.types import MlpUnit, PrunableDim
from llmprune.common.distributed import sum_over_processes
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.cross_validated_ridge import NormalEquations
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.records import ExpertsRecord
from llmprune.prune.relative_error import RelativeError
from llmprune.prune.repair.base import Stage
from llmprune.prune.routed_tokens import RoutedTokens
from llmprune.recipe.refit import PASSES_OF_EXPERTS

_LEAST_OF_FOLD = 16  # tokens of an expert in every fold, so that each can judge


class RoutedExpertRefit:
    """Ridge regression of every routed expert's output projection towards the dense hidden states."""

    stage = Stage.AFTER_GAP

    def apply(self, run: Pass2Context, work: LayerWork) -> None:
        """Refit the experts of the layer, if it has some that can be refit."""
        step, unit = work.step, work.step.experts
        if unit is None or not step.refits_output:
            return
        with (
            run.dense.decoder.layer(step.old, work.weights.uncut) as uncut,
            run.pruned.decoder.layer(step.new, work.weights.cut) as cut,
        ):
            scale = run.scales.measure(run.pruned, step.new, layer=cut, name=unit.path)
            if scale is None:  # a norm follows the experts
                return
            solver = _Solver(run, work, unit=unit, layer=cut, scale=scale)
            error = solver.record(uncut)
            sum_over_processes(error.reducible_state())
            if work.outcome.error_cut is None:
                work.outcome.error_cut = error.value()
            work.outcome.experts = solver.solve()
        name = unit.tensors[-1].name
        if solver.weight is not None:
            work.weights.cut[name] = solver.weight


@dataclass(frozen=True)
class _Part:
    """Tokens [T] of one expert in one batch, its weighted activations [T, F] and squared weights [T] for them."""

    expert: int
    token_T: Tensor
    input_TF: Tensor
    square_T: Tensor


@dataclass
class _Solver:
    """Refit of one layer's experts. ``layer``: the cut layer. ``weight``: the stacked result, None if none changed."""

    run: Pass2Context
    work: LayerWork
    unit: MlpUnit
    layer: nn.Module
    scale: float
    weight: Tensor | None = None
    _missing: dict[str, HiddenStates] = field(default_factory=dict)
    _held_out: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.run.pruned.decoder.device_of(self.work.step.new)
        self.tokens = RoutedTokens(self.run.pruned, self.unit)

    def record(self, uncut: nn.Module) -> RelativeError:
        """Run the layer uncut and cut; store what its output lacks, and the routing. Return the cut layer's error."""
        run, step, runs, error = self.run, self.work.step, self.work.runs, RelativeError()
        with self.tokens.recorded(self.layer):
            pairs = zip(runs.outputs(step.new, uncut), runs.outputs(step.new, self.layer), strict=True)
            for (batch, _, uncut_BLD), (_, _, cut_BLD) in pairs:
                target_BLD = run.dense.hidden_states.at(batch, self.device)
                before_gap_BLD = self.work.before_gap.at(batch, self.device).float()
                error.update(target_BLD - cut_BLD, target_BLD)
                lost_BLD = uncut_BLD.float() - cut_BLD.float() + target_BLD.float() - before_gap_BLD
                inherited_BLD = before_gap_BLD - uncut_BLD.float()
                run.pruned.append(self._missing, "lost", value_BLX=lost_BLD / self.scale)
                run.pruned.append(self._missing, "inherited", value_BLX=inherited_BLD / self.scale)
        return error

    def solve(self) -> ExpertsRecord:
        """Solve all experts with enough tokens, some in each pass."""
        output = self.unit.tensors[-1]
        count = self.layer.get_parameter(output.name).shape[0]
        counts_EG = self.tokens.counts(count, self.run.folds)
        enough_E = (counts_EG.sum(1) >= self.unit_width) & (counts_EG >= _LEAST_OF_FOLD).all(1)
        chosen = enough_E.nonzero().squeeze(1).tolist()
        solved: dict[int, Tensor] = {}
        for start in range(min(PASSES_OF_EXPERTS, len(chosen))):
            solved = self._pass(chosen[start::PASSES_OF_EXPERTS], before=solved)
        changes = [change for change in self._held_out if change < 0]
        mean = sum(self._held_out) / len(self._held_out) if self._held_out else None
        return ExpertsRecord(refit=len(changes), few_tokens=count - len(chosen), held_out=mean)

    @property
    def unit_width(self) -> int:
        """Neurons of a kept expert."""
        output = self.unit.tensors[-1]
        return self.layer.get_parameter(output.name).shape[output.dim]

    def _pass(self, experts: Sequence[int], *, before: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return Δ [D, F] of the experts that a solve improves. ``before``: those of the last pass."""
        equations = {expert: self.run.make_equations() for expert in experts}
        for batch in self.tokens.batches:
            lost_TD, inherited_TD = self._lacking(batch, before)
            self._begin(equations, lost_TD)
            for part, share_T1 in self._shares(batch, experts):
                folds_T = self.run.folds.of_tokens(batch, len(lost_TD)).to(self.device)[part.token_T]
                for fold in range(self.run.folds.count):
                    rows_R = (folds_T == fold).nonzero().squeeze(1)
                    token_R, factor = part.token_T[rows_R], self.run.folds.factor(fold)
                    share_R1 = share_T1[rows_R] * factor
                    equations[part.expert].update(
                        part.input_TF[rows_R] * factor,
                        lost_TD[token_R] * share_R1,
                        inherited_TD=inherited_TD[token_R] * share_R1,
                        fold=fold,
                    )
        sum_over_processes([sums for one in equations.values() for sums in one.reducible_state()])
        return {
            expert: delta_DF for expert, one in equations.items() if (delta_DF := self._solved(expert, one)) is not None
        }

    def _begin(self, equations: dict[int, NormalEquations], lost_TD: Tensor) -> None:
        """Allocate the sums in every process, also where this one has no token of an expert."""
        none_0F, none_0D = lost_TD.new_zeros(0, self.unit_width), lost_TD[:0]
        for one in equations.values():
            one.update(none_0F, none_0D, inherited_TD=none_0D)

    def _lacking(self, batch: int, solved: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the output lacks in a batch [T, D], lost and inherited, after the experts solved last."""
        lost_BLD = self._missing["lost"].at(batch, self.device)
        inherited_TD = self._missing["inherited"].at(batch, self.device).flatten(0, 1)
        if solved:
            lost_TD = lost_BLD.flatten(0, 1).clone()
            for part in self._parts(batch, solved):
                lost_TD.index_add_(0, part.token_T, part.input_TF @ solved[part.expert].T, alpha=-1)
            lost_BLD = lost_TD.view_as(lost_BLD)
            self._missing["lost"][batch] = lost_BLD
        return lost_BLD.flatten(0, 1), inherited_TD

    def _parts(self, batch: int, experts: Sequence[int] | dict[int, Tensor]) -> Iterator[_Part]:
        """Yield the tokens of each of these experts in a batch, one expert's activations at a time."""
        hidden_TD = self.tokens.hidden_states(batch, self.device)
        for expert in experts:
            token_T, weight_T = self.tokens.routed_to(batch, expert, device=self.device)
            activation_TF = self.tokens.activations(self.layer, expert, hidden_TD=hidden_TD[token_T])
            yield _Part(expert, token_T, activation_TF.float() * weight_T.unsqueeze(1), weight_T.square())

    def _shares(self, batch: int, experts: Sequence[int]) -> Iterator[tuple[_Part, Tensor]]:
        """Yield the parts, and the share [T, 1] of the error that each of its tokens leaves to the expert."""
        routed = {expert: self.tokens.routed_to(batch, expert, device=self.device) for expert in experts}
        tokens = self.tokens.hidden_states(batch, self.device).shape[0]
        total_T = torch.zeros(tokens, device=self.device)
        for token_T, weight_T in routed.values():
            total_T.index_add_(0, token_T, weight_T.square())
        for part in self._parts(batch, experts):
            yield part, (part.square_T / total_T[part.token_T].clamp_min(1e-30)).unsqueeze(1)

    def _solved(self, expert: int, equations: NormalEquations) -> Tensor | None:
        """Solve one expert and add Δ to its weights; None where the weights that it has are better."""
        name = self.unit.tensors[-1].name
        try:
            repair = equations.solve(f"layer {self.work.step.old}, expert {expert} of {name}")
        except NumericalError:  # its tokens are too alike: nothing to be learned from them
            return None
        self._held_out.append(repair.held_out or 0.0)
        if repair.delta_DF is None:
            return None
        if self.weight is None:
            self.weight = self.work.weights.cut[name].clone()
        output = self.unit.tensors[-1]
        own, part = PrunableDim(name, output.dim - 1), self.weight[expert]
        part.copy_(part.float() + outputs_first(repair.delta_DF, own))
        return repair.delta_DF
