"""Pass 2's last cut: a layer's matrices made sparse, one input after the other, each on what those before it left.

The layer is run in stages (``model.stages``). Projections that share an input share its XᵀX, taken on the pruned
stream with all earlier projections as they will be saved, and are pruned as one. With the refit, output projections
are first solved without a mask towards the dense hidden states, and every projection's kept weights are solved again
on their support.

What an output projection is to write, Y:

    the last of a layer, whose output is added to the hidden states:   the dense stream after the layer (and its
        gap) less what the layer puts out without it
    an earlier one (attention):   what makes the pruned stream before the layer and its output add up to the dense
        ones
    one that a norm follows:   its own dense output
    any other:   what its dense weights write, XW₀ᵀ

Shapes: B batch, L sequence length, D hidden size, T tokens, O outputs of a projection, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.anatomy.projections import Projection, projections_of, set_weight, weight_of
from llmprune.anatomy.types import Anatomy
from llmprune.common.distributed import sum_over_processes
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.cross_validated_ridge import Repair
from llmprune.common.linalg.gram import add_gram, mirror
from llmprune.common.linalg.masked_least_squares import output_energy, solve_on_support
from llmprune.layerwise.forward import LayerwiseForward, outputs_of
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.prune.repair.folds import Folds
from llmprune.prune.repair.residual_writers import LayerTopology, ResidualWriter, TopologyCache
from llmprune.prune.snapshots import MatrixRecord
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity, select

_DAMPING = 0.01  # of XᵀX, in units of its mean diagonal
_STEPS = 2  # of conjugate gradients on the kept support: more fit the calibration text and lose elsewhere


@dataclass
class Targets:
    """What the dense model said in the layer: its hidden states after it (and its gap), and by writer, where it is
    not the last, those behind it (``ResidualWriter.behind``)."""

    after: HiddenStates
    written: dict[str, HiddenStates] = field(default_factory=dict)


class Sparsifier:
    """Makes the layers of pass 2 sparse. ``scales`` are kept with the run's snapshots."""

    def __init__(
        self,
        sparsity: Sparsity,
        refit: Refit | None,
        *,
        anatomy: Anatomy,
        experts: int | None,
        folds: Folds,
        scales: dict[str, float | None],
    ) -> None:
        self.sparsity, self.experts, self.folds = sparsity, experts, folds
        self.refit = refit if sparsity.method.refits else None
        self.outlines = TopologyCache(anatomy, scales, writers=self.refit is not None)

    @contextmanager
    def listening(
        self, walk: LayerwiseForward, layer: nn.Module, *, outline: LayerTopology, targets: Targets
    ) -> Iterator[None]:
        """While the dense stream goes through the layer, note what its earlier writers should write."""
        with ExitStack() as hooks:
            for writer in outline.writers:
                if not writer.last:
                    see = partial(self._note, walk, writer, targets)
                    hooks.enter_context(outputs_of(layer.get_submodule(writer.name), see))
            yield

    def _note(self, walk: LayerwiseForward, writer: ResidualWriter, targets: Targets, output: Tensor) -> None:  # noqa: PLR0917 - a callback
        noted = targets.written.get(writer.name)
        batch = len(noted) if noted is not None else 0
        hidden_BLD = walk.streams[batch].to(output.device)
        wanted_BLD = writer.behind(hidden_BLD, output)
        if noted is None:
            noted = targets.written[writer.name] = walk.room(wanted_BLD)
        noted.append(wanted_BLD)

    @torch.no_grad()
    def prune(
        self, stream: LayerwiseForward, new: int, *, layer: nn.Module, outline: LayerTopology, targets: Targets | None
    ) -> tuple[StagedLayer, tuple[MatrixRecord, ...], Repair | None]:
        """Prune the layer's matrices in place; the staged layer then gives its outputs. The repair is the last's."""
        staged, repair = StagedLayer(stream, new, layer=layer, order=outline.order), None
        records: list[MatrixRecord] = []
        chosen = {one.name: one for one in select(projections_of(layer), self.sparsity, experts=self.experts).chosen}
        everything = {one.name: one for one in projections_of(layer)}
        by_name = {writer.name: writer for writer in outline.writers}
        for group in outline.order.groups:
            together = [chosen[name] for name in group if name in chosen and name not in by_name]
            if together:
                records += self._prune_together(staged, together)
                staged.finish(together[0].name)
            for name in (name for name in group if name in by_name):
                assert targets is not None, "writers are only looked for where there is a dense stream"
                writer, projection = by_name[name], everything[name]
                if name in chosen or writer.last:
                    repair, written = self._prune_writer(
                        staged, writer, projection=projection, masked=name in chosen, targets=targets
                    )
                    records += written
                staged.finish(name)
        return staged, tuple(records), repair

    def _prune_together(self, staged: StagedLayer, projections: Sequence[Projection]) -> list[MatrixRecord]:
        """Projections with the same input, towards what their weights write now."""
        weight_OI = torch.cat([weight_of(staged.layer, one).float() for one in projections])
        sums = self._sums(staged, projections[0].name, inputs=weight_OI.shape[1])
        if sums is not None and sums.ndim == 2:
            _damp(sums, _DAMPING)
        return self._write(staged, projections, wanted_OI=weight_OI, sums=sums)

    def _sums(self, staged: StagedLayer, name: str, *, inputs: int) -> Tensor | None:
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
        self, staged: StagedLayer, writer: ResidualWriter, *, projection: Projection, masked: bool, targets: Targets
    ) -> tuple[Repair, list[MatrixRecord]]:
        """An output projection, towards what the dense stream wants of it."""
        assert self.refit is not None
        weight_OI = weight_of(staged.layer, projection).float()
        equations = self.refit.open(self.folds.count)
        for batch, input_BLI, wanted_BLD in self._wanted(staged, writer, targets=targets):
            for fold, (input_TI, wanted_TD) in self.folds.parts(batch, input_BLI, wanted_BLD):
                equations.update(input_TI, None, inherited_TD=wanted_TD, fold=fold)
        sum_over_processes(equations.sums())
        gram_II = equations.subtract_current_output(weight_OI)
        repair = equations.solve(f"layer {staged.index}, {writer.name}")
        del equations  # its Gram matrices, before the method needs room for others
        wanted_OI = weight_OI if repair.delta_DF is None else weight_OI + repair.delta_DF
        if not masked:
            set_weight(staged.layer, projection, weight_OI=wanted_OI)
            return repair, []
        _damp(gram_II, _DAMPING)
        return repair, self._write(staged, [projection], wanted_OI=wanted_OI, sums=gram_II)

    def _wanted(
        self, staged: StagedLayer, writer: ResidualWriter, *, targets: Targets
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch number, inputs [B, L, I] of an output projection, what its matrix is to write [B, L, D])."""
        walk, device = staged.walk, staged.walk.decoder.device_of(staged.index)
        bias = getattr(staged.layer.get_submodule(writer.name), "bias", None)
        shift = None if bias is None else bias.float()
        if writer.last:
            assert writer.scale is not None
            for batch, input_BLI, output_BLD in staged.without(writer.name, keep=True):
                missing_BLD = targets.after[batch].to(device).float() - output_BLD.float()
                if writer.scale != 1:
                    missing_BLD /= writer.scale
                yield batch, input_BLI.view(*output_BLD.shape[:2], -1), _less(missing_BLD, shift)
            return
        for batch, input_BLI in staged.inputs(writer.name, keep=True):
            wanted_BLD = targets.written[writer.name][batch].to(device).float()
            if writer.scale is not None:
                wanted_BLD = torch.sub(wanted_BLD, walk.streams[batch].to(device).float(), alpha=1 / writer.scale)
            yield batch, input_BLI.view(*wanted_BLD.shape[:2], -1), _less(wanted_BLD, shift)

    def _write(
        self,
        staged: StagedLayer,
        projections: Sequence[Projection],
        *,
        wanted_OI: Tensor,
        sums: Tensor | None,
    ) -> list[MatrixRecord]:
        """Find the sparse weights of some projections, as one, and put them into the layer."""
        sparse_OI, error_O = wanted_OI, None
        for pattern in self.sparsity.steps():
            sparse_OI, mask_OI = self.sparsity.method.prune(sparse_OI, sums, pattern=pattern)
            if self.refit is not None:
                assert sums is not None
                sparse_OI, error_O = solve_on_support(
                    sparse_OI, mask_OI, gram_II=sums, wanted_OI=wanted_OI, steps=_STEPS
                )
        if not torch.isfinite(sparse_OI).all():
            names = ", ".join(one.name for one in projections)
            raise NumericalError(
                f"sparsity.method {self.sparsity.method.kind}: weights of {names} in layer {staged.index} are not "
                "finite; check the checkpoint's weights, or leave the matrix out with sparsity.skip"
            )
        outputs, errors = [one.outputs for one in projections], None
        if sums is not None and sums.ndim == 2:
            error_O = output_energy(sparse_OI - wanted_OI, sums) if error_O is None else error_O
            errors = _relative(error_O, output_energy(wanted_OI, sums), outputs=outputs)
        records = []
        for place, (one, part_OI) in enumerate(zip(projections, torch.split(sparse_OI, outputs), strict=True)):
            set_weight(staged.layer, one, weight_OI=part_OI)
            kept = float((part_OI != 0).float().mean())
            records.append(MatrixRecord(one.name, kept, errors[place] if errors else None))
        return records


def _relative(error_O: Tensor, energy_O: Tensor, *, outputs: list[int]) -> list[float]:
    """‖X (W − W*)ᵀ‖ / ‖X W*ᵀ‖ of each of the matrices that were joined along their outputs, from the squares."""
    pairs = zip(torch.split(error_O, outputs), torch.split(energy_O, outputs), strict=True)
    return [float((error.sum() / energy.sum().clamp_min(1e-30)).clamp_min(0).sqrt()) for error, energy in pairs]


def _less(value_BLD: Tensor, shift_D: Tensor | None) -> Tensor:
    return value_BLD if shift_D is None else value_BLD - shift_D


def _damp(gram_II: Tensor, damping: float) -> None:
    gram_II.diagonal().add_((damping * gram_II.diagonal().mean()).clamp_min(1e-30))
