"""Sparsification of a layer's weight matrices, one after the other, each on inputs that pruned earlier ones produce.

The layer is run in stages (``StagedLayer``). Projections that share an input share its XᵀX, computed on the pruned
hidden states with all earlier projections as they will be saved, and are pruned as one matrix. With the refit, output
projections are first solved without a mask towards the dense hidden states, and the kept weights of every projection
are solved again on their support. Inputs of output projections whose order is free are ordered for the pattern first
(``free_channels``).

Regression target Y of a projection:

    the layer's last residual writer:   the dense hidden states after the layer (and its gap) minus the layer's output
        without it
    an earlier writer (attention):      what makes the pruned residual stream after it equal to the dense one
    a writer that a norm follows:       its own dense output
    any other projection:               the output of its dense weights, XW₀ᵀ

Shapes: B batch, L sequence length, D hidden size, T tokens, O outputs of a projection, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.anatomy.names import is_inside
from llmprune.anatomy.projections import Projection, projections_of, set_weight, weight_of
from llmprune.anatomy.stacked_projections import stacked_projections
from llmprune.anatomy.types import MlpUnit
from llmprune.common.distributed import sum_over_processes
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.cross_validated_ridge import Repair
from llmprune.common.linalg.gram import add_gram, mirror
from llmprune.common.linalg.masked_least_squares import output_energy, solve_on_support
from llmprune.common.linalg.precision import exact_products
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.prune.free_channels.channels import FreeChannels
from llmprune.prune.records import MatrixRecord
from llmprune.prune.repair.residual_writers import LayerTopology, ResidualWriter
from llmprune.prune.sparse_experts import SparseExperts
from llmprune.prune.writer_targets import DenseTargets, targets_of
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity, select

_DAMPING = 0.01  # of XᵀX, in units of its mean diagonal
_STEPS = 2  # of conjugate gradients on the kept support: more fit the calibration text and raise the error elsewhere


@dataclass(frozen=True)
class SparseLayer:
    """Records of a layer's sparse matrices, and the repair of its last residual writer; None without a refit."""

    matrices: tuple[MatrixRecord, ...]
    repair: Repair | None


@dataclass(frozen=True)
class Sparsifier:
    """Sparsification of a layer. ``experts``: number of experts of each mixture that are kept.

    ``channels``: free channels by output projection; ``routed``: the layer's routed experts, if it is known which
    tokens each of them gets.
    """

    sparsity: Sparsity
    refit: Refit | None
    experts: int | None
    folds: WindowGroups
    channels: Mapping[str, FreeChannels]
    routed: MlpUnit | None = None

    @torch.no_grad()
    def prune(self, staged: StagedLayer, topology: LayerTopology, *, targets: DenseTargets) -> SparseLayer:
        """Prune the layer's matrices in place; the staged layer then returns its outputs."""
        layer, repair = staged.layer, None
        records: list[MatrixRecord] = []
        chosen = {one.name: one for one in select(projections_of(layer), self.sparsity, experts=self.experts).chosen}
        everything = {one.name: one for one in projections_of(layer)}
        for group in topology.order.groups:
            if topology.last is not None and topology.last.name in group and self._is_beside(topology.last):
                records += self._prune_experts(staged)  # the refit of the last writer then corrects their error
            together = [chosen[name] for name in group if name in chosen and topology.writer(name) is None]
            if together:
                records += self._prune_together(staged, together)
                staged.finish(together[0].name)
            for writer in filter(None, map(topology.writer, group)):
                if writer.name in chosen or writer.is_last:
                    pruned = self._prune_writer(
                        staged,
                        writer,
                        projection=everything[writer.name],
                        is_masked=writer.name in chosen,
                        targets=targets,
                    )
                    repair = pruned.repair
                    records += pruned.matrices
                staged.finish(writer.name)
        if topology.last is None or not self._is_beside(topology.last):
            records += self._prune_experts(staged)
        return SparseLayer(tuple(records), repair)

    def _is_beside(self, writer: ResidualWriter) -> bool:
        """Check that a writer is within the module of the routed experts, as that of a shared expert is."""
        around = self.routed.path.rpartition(".")[0] if self.routed is not None else ""
        return bool(around) and is_inside(writer.name, around)

    def _prune_together(self, staged: StagedLayer, projections: Sequence[Projection]) -> list[MatrixRecord]:
        """Prune projections with the same input towards the outputs of their current weights."""
        weight_OI = torch.cat([weight_of(staged.layer, one).float() for one in projections])
        sums = self._sums(staged, projections[0].name, inputs=weight_OI.shape[1])
        if sums is not None and sums.ndim == 2:
            _damp(sums, _DAMPING)
        return self._write(staged, projections, target_OI=weight_OI, sums=sums)

    def _sums(self, staged: StagedLayer, name: str, *, inputs: int) -> Tensor | None:
        """Return what the method needs of a projection's inputs: XᵀX [I, I], its diagonal [I], or nothing."""
        needs = self.sparsity.method.required_moments(self.refit is not None)
        if needs == "nothing":
            return None
        sums: Tensor | None = None
        for _, input_BLI in staged.inputs(name, keep=True):
            input_TI = input_BLI.flatten(0, -2).float()
            if sums is None:
                sums = input_TI.new_zeros((inputs, inputs) if needs == "gram" else inputs)
            if needs == "gram":
                add_gram(sums, input_TI)
            else:
                sums += input_TI.square().sum(0)
        assert sums is not None, "there is a batch"
        sum_over_processes([sums])
        if needs == "gram":
            mirror(sums)
        if not torch.isfinite(sums).all():
            raise NumericalError(
                f"the inputs of {name} in layer {staged.index} are too large to be squared in float32; "
                "check the checkpoint's weights, or leave the matrix out with sparsity.skip"
            )
        return sums

    def _prune_writer(
        self,
        staged: StagedLayer,
        writer: ResidualWriter,
        *,
        projection: Projection,
        is_masked: bool,
        targets: DenseTargets,
    ) -> SparseLayer:
        """Refit a residual writer towards its dense targets, then prune it if ``is_masked``."""
        weight_OI = weight_of(staged.layer, projection).float()
        repair, gram_II = self._solve_writer(staged, writer, weight_OI=weight_OI, targets=targets)
        target_OI = weight_OI if repair.delta_DF is None else weight_OI + repair.delta_DF
        if not is_masked:
            set_weight(staged.layer, projection, weight_OI=target_OI)
            return SparseLayer((), repair)
        _damp(gram_II, _DAMPING)
        return SparseLayer(tuple(self._write(staged, [projection], target_OI=target_OI, sums=gram_II)), repair)

    def _solve_writer(
        self, staged: StagedLayer, writer: ResidualWriter, *, weight_OI: Tensor, targets: DenseTargets
    ) -> tuple[Repair, Tensor]:
        """Return the repair of a residual writer, and XᵀX [I, I] of its inputs; the other sums are freed."""
        assert self.refit is not None, "writers are only found for the refit"
        equations = self.refit.make_equations(self.folds.count, one_source=self.folds.one_source)
        for one in targets_of(staged, writer, targets=targets):
            for fold, (input_TI, target_TD) in self.folds.parts(one.batch, one.input_BLI, one.target_BLD):
                equations.update(input_TI, None, inherited_TD=target_TD, fold=fold)
        sum_over_processes(equations.reducible_state())
        gram_II = equations.subtract_current_output(weight_OI)
        return equations.solve(f"layer {staged.index}, {writer.name}"), gram_II

    @exact_products()
    def solve(self, target_OI: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return sparse weights [O, I], and the squared error of each output [O] where the kept ones are solved again.

        ``target_OI``: the weights whose outputs they approach; ``sums``: as the method needs of the inputs.
        """
        sparse_OI, error_O = target_OI, None
        for pattern in self.sparsity.steps():
            sparse_OI, mask_OI = self.sparsity.method.prune(sparse_OI, sums, pattern=pattern)
            if self.refit is not None:
                assert sums is not None, "the refit needs XᵀX"
                sparse_OI, error_O = solve_on_support(
                    sparse_OI, mask_OI, gram_II=sums, wanted_OI=target_OI, steps=_STEPS
                )
        return sparse_OI, error_O

    def _solve_expert(self, target_OI: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if sums is not None and sums.ndim == 2:
            _damp(sums, _DAMPING)
        return self.solve(target_OI, sums)

    def _prune_experts(self, staged: StagedLayer) -> list[MatrixRecord]:
        """Prune the stacks of the layer's routed experts."""
        if self.routed is None:
            return []
        stacks = select(stacked_projections(staged.layer, [self.routed]), self.sparsity, experts=None).chosen
        moments = self.sparsity.required_moments(self.refit is not None)
        return SparseExperts(self.routed, stacks, moments, self._solve_expert).prune(staged)

    @exact_products()
    def _write(
        self,
        staged: StagedLayer,
        projections: Sequence[Projection],
        *,
        target_OI: Tensor,
        sums: Tensor | None,
    ) -> list[MatrixRecord]:
        """Find the sparse weights of projections with the same input, as one matrix, and put them into the layer."""
        order_I = self._permute(staged, projections, target_OI=target_OI, sums=sums)
        if order_I is not None:
            target_OI = target_OI[:, order_I]
        sparse_OI, error_O = self.solve(target_OI, sums)
        if not torch.isfinite(sparse_OI).all():
            names = ", ".join(one.name for one in projections)
            raise NumericalError(
                f"sparsity.method {self.sparsity.method.kind}: weights of {names} in layer {staged.index} are not "
                "finite; check the checkpoint's weights, or leave the matrix out with sparsity.skip"
            )
        outputs = [one.outputs for one in projections]
        errors: Sequence[float | None] = [None] * len(projections)
        if sums is not None and sums.ndim == 2:
            error_O = output_energy(sparse_OI - target_OI, sums) if error_O is None else error_O
            errors = _relative(error_O, output_energy(target_OI, sums), outputs=outputs)
        parts = torch.split(sparse_OI, outputs)
        for one, part_OI in zip(projections, parts, strict=True):
            set_weight(staged.layer, one, weight_OI=part_OI)
        shares = torch.stack([(part_OI != 0).float().mean() for part_OI in parts]).tolist()
        return [
            MatrixRecord(one.name, kept, error, permuted=order_I is not None)
            for one, kept, error in zip(projections, shares, errors, strict=True)
        ]

    def _permute(
        self, staged: StagedLayer, projections: Sequence[Projection], *, target_OI: Tensor, sums: Tensor | None
    ) -> Tensor | None:
        """Choose the order of an output projection's inputs, and permute the sums and what computes the inputs.

        Returns the order, int64 [I] on the projection's device; None where the order is not free.
        """
        channels = self.channels.get(projections[0].name)
        if channels is None:
            return None
        scores_OI = self.sparsity.method.importance(target_OI, sums)
        order_SC = channels.order(scores_OI, sparsity=self.sparsity)
        order_I = channels.inputs(order_SC).to(target_OI.device)
        if sums is not None:
            sums.copy_(sums[order_I][:, order_I] if sums.ndim == 2 else sums[order_I])
        channels.permute_sources(staged.layer, order_SC)
        staged.permute_inputs(projections[0].name, order_I, sources=channels.modules)
        return order_I


def _relative(error_O: Tensor, energy_O: Tensor, *, outputs: list[int]) -> Sequence[float | None]:
    """Return ‖X (W − W*)ᵀ‖ / ‖X W*ᵀ‖ of each matrix of a group, from the squares by output."""
    pairs = zip(torch.split(error_O, outputs), torch.split(energy_O, outputs), strict=True)
    found = [(error.sum() / energy.sum().clamp_min(1e-30)).clamp_min(0).sqrt() for error, energy in pairs]
    errors: list[float | None] = torch.stack(found).tolist()
    return errors


def _damp(gram_II: Tensor, damping: float) -> None:
    gram_II.diagonal().add_((damping * gram_II.diagonal().mean()).clamp_min(1e-30))
