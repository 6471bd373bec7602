"""Pass 2: walk dense and pruned side by side; cut, refit and write each layer, then let it go.

Two streams of hidden states run in step. The dense one says what each point of
the network should put out, the pruned one what the network being built does. A
removed layer is folded into the kept layer before it: that layer's target is the
dense stream after the gap.

Shapes: N windows, B batch, L sequence length, D hidden size, F neurons kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llmprune.anatomy.selection import rows_of
from llmprune.anatomy.value import Anatomy, MlpUnit
from llmprune.cut import Cut, gap_after
from llmprune.folds import Folds, every_eighth, folds_of
from llmprune.model.loading import tensors_of
from llmprune.model.processes import from_first, is_first, share_of, sum_over_processes
from llmprune.model.streams import Streams, StreamStore, Trail
from llmprune.model.walk import Decoder, Tensors, Walk, outputs_of, require_same_calls
from llmprune.normal_equations import NormalEquations, Repair
from llmprune.progress import track
from llmprune.readings import Reading, read_both, read_gated, read_uncut
from llmprune.refit import Refit
from llmprune.residual import RelativeError, residual_scale
from llmprune.scores import unit_key
from llmprune.snapshots import LayerRecord, MatrixRecord, Snapshots
from llmprune.sparsifying import Sparsifier, Targets
from llmprune.sparsity.section import Sparsity
from llmprune.surgery import add_to_output, add_to_strand
from llmprune.up_projection import UpEquations, UpRepair

Outputs = Iterator[tuple[int, Tensor]]  # batch number, hidden states


class Pruning:
    """One run of pass 2. ``write`` gets every finished layer's tensors under the layer's new index."""

    def __init__(
        self,
        dense: Decoder,
        pruned: Decoder,
        anatomy: Anatomy,
        cut: Cut,
        refit: Refit | None,
        write: Callable[[int, Tensors], None],
        sparsity: Sparsity | None = None,
    ) -> None:
        self.dense, self.pruned, self.anatomy, self.cut = dense, pruned, anatomy, cut
        self.refit, self.write, self.sparsity = refit, write, sparsity
        self._scales: dict[str, float | None] = {}
        self._trail: Trail | None = None

    @torch.no_grad()
    def run(
        self,
        windows_NL: Tensor,
        batch_size: int,
        snapshots: Snapshots | None = None,
        store: StreamStore | None = None,
        sources_N: Tensor | None = None,
    ) -> tuple[list[LayerRecord], Walk]:
        """Prune every kept layer; returns what was repaired, and the pruned stream after the last layer.

        With snapshots, layers that an earlier run finished are not done again. ``sources_N`` says which source
        each window is from.
        """
        self._trail = store.trail if store else None
        mine_NL = share_of(windows_NL)
        self._folds = Folds(folds_of(len(windows_NL), sources_N), batch_size)
        self._held_out = Folds(every_eighth(len(windows_NL)), batch_size)
        target = Walk(self.dense, mine_NL, batch_size, store)
        stream = Walk(self.pruned, mine_NL, batch_size, store)
        require_same_calls(target, stream, self.cut.layers)
        records = snapshots.records() if snapshots else []
        if snapshots:
            self._scales = snapshots.scales
        self._sparsifier = self._make_sparsifier()
        if snapshots and records:
            snapshots.restore(target.streams, stream.streams)
        elif self._needs_dense():
            for index in range(self.cut.layers[0]):
                self._pass_dense(target, index)
        for new in track(range(len(records), len(self.cut.layers)), "pass 2: cut and refit"):
            records.append(self._prune_layer(new, target, stream))
            if snapshots:
                snapshots.keep(records, target.streams, stream.streams)
        return records, stream

    def _make_sparsifier(self) -> Sparsifier | None:
        if self.sparsity is None:
            return None
        experts = self.cut.num_experts or (self.anatomy.experts.count if self.anatomy.experts else None)
        return Sparsifier(self.sparsity, self.refit, self.anatomy, experts, self._folds, self._scales)

    def _needs_dense(self) -> bool:
        """Whether something is measured against the dense stream: a cut, or the refit of sparse matrices."""
        return self._sparsifier is None or self._sparsifier.refit is not None or not self.cut.is_empty

    def _prune_layer(self, new: int, target: Walk, stream: Walk) -> LayerRecord:
        if self._sparsifier and self._sparsifier.refit is not None:
            return self._sparsify_towards(self._sparsifier, new, target, stream)
        if not self._needs_dense():
            return self._sparsify_alone(new, stream)
        old = self.cut.layers[new]
        unit, gap = self._refit_unit(old), gap_after(self.cut.layers, new, self.cut.num_layers)
        wanted = self._pass_dense(target, old)
        uncut = self.dense.tensors(old)
        self.pruned.tensors(new)  # cut out of the dense layer while that is at hand, and held
        self.dense.forget()
        if self._is_untouched(new):
            self._write(new, self.pruned.tensors(new))
            if self.dense.rounds_otherwise(old):
                with self.pruned.layer(new) as layer:
                    stream.pass_through(new, layer)
            else:
                for batch, hidden_BLD in enumerate(target.streams):
                    stream.advance(batch, hidden_BLD)
            return LayerRecord(old, 0.0, None)
        heads = self._repair_heads(new, uncut, stream)
        reached = target.copy() if gap and unit else target.streams  # the dense stream before the gap
        for index in gap:
            self._pass_dense(target, index)
        repair = up = None
        if unit is not None:
            up = self._repair_up(new, unit, self._scale_of(old, unit), target, stream, wanted)
            repair, error_cut = self._solve(new, uncut, unit, target, reached, stream, wanted, moved=up is not None)
            error_cut = up[1] if up else error_cut
        del uncut, reached, wanted
        with self.pruned.layer(new) as layer:
            if repair is not None and unit is not None and repair.delta_DF is not None:
                add_to_output(layer, unit, repair.delta_DF)
            error, matrices = self._finish(new, layer, target, stream)
        heads_held_out, up_held_out = heads.held_out if heads else None, up[0].held_out if up else None
        if repair is None:
            return LayerRecord(old, error, None, heads_held_out=heads_held_out, matrices=matrices)
        return LayerRecord(
            old,
            error_cut,
            error,
            repair.ridge,
            repair.inherited,
            repair.held_out,
            heads_held_out,
            up_held_out,
            matrices,
        )

    def _finish(
        self, new: int, layer: nn.Module, target: Walk | None, stream: Walk
    ) -> tuple[float | None, tuple[MatrixRecord, ...]]:
        """Make the layer sparse where that is asked for, run it, and write it."""
        matrices: tuple[MatrixRecord, ...] = ()
        outputs: Outputs = ((batch, output_BLD) for batch, _, output_BLD in stream.outputs(new, layer))
        if self._sparsifier:
            outline = self._sparsifier.outlines.of(stream, new, layer, self.cut.layers[new])
            staged, matrices, _ = self._sparsifier.prune(stream, new, layer, outline, None)
            outputs = staged.outputs()
        error = self._advance(outputs, target, stream)
        self._write(new, tensors_of(layer))
        self.pruned.forget()
        return error, matrices

    def _sparsify_alone(self, new: int, stream: Walk) -> LayerRecord:
        """Make a layer sparse that nothing was cut from, without a look at the dense stream."""
        with self.pruned.layer(new) as layer:
            _, matrices = self._finish(new, layer, None, stream)
        return LayerRecord(self.cut.layers[new], None, None, matrices=matrices)

    def _sparsify_towards(self, sparsifier: Sparsifier, new: int, target: Walk, stream: Walk) -> LayerRecord:
        """Cut a layer, make it sparse, and repair it for both at once."""
        old = self.cut.layers[new]
        targets = Targets(target.streams)
        with self.dense.layer(old) as layer:
            outline = sparsifier.outlines.of(target, old, layer, old)
            with sparsifier.listening(target, layer, outline, targets):
                target.pass_through(old, layer)
        self.pruned.tensors(new)  # cut out of the dense layer while that is at hand, and held
        self.dense.forget()
        for index in gap_after(self.cut.layers, new, self.cut.num_layers):
            self._pass_dense(target, index)
        unit = self._refit_unit(old)
        writer = next((one for one in outline.writers if unit is not None and one.name == unit.output), None)
        up = self._repair_up(new, unit, writer.scale, target, stream, []) if unit and writer else None
        with self.pruned.layer(new) as layer:
            staged, matrices, repair = sparsifier.prune(stream, new, layer, outline, targets)
            error = self._advance(staged.outputs(), target, stream)
            self._write(new, tensors_of(layer))
        self.pruned.forget()
        if repair is None:
            return LayerRecord(old, error, None, matrices=matrices)
        found = (repair.ridge, repair.inherited, repair.held_out)
        return LayerRecord(old, None, error, *found, up_held_out=up[0].held_out if up else None, matrices=matrices)

    def _write(self, new: int, tensors: Tensors) -> None:
        if is_first():
            self.write(new, tensors)

    def _is_untouched(self, new: int) -> bool:
        """Whether nothing is cut up to this layer and in the gap after it: then both streams are one."""
        if self._sparsifier:
            return False
        first_gap = next((index for index in range(self.cut.num_layers) if index not in self.cut.layers), None)
        old = self.cut.layers[new]
        narrowed = any(self._narrowed(index) for index in self.cut.layers[: new + 1])
        return not narrowed and (first_gap is None or first_gap > old + 1)

    def _narrowed(self, layer: int) -> set[str]:
        """Keys of the layer's units that lose neurons, and of its experts and attention heads if some go."""
        block, attention = self.anatomy.blocks[layer], self.anatomy.attention[layer]
        keys = {unit_key(layer, unit.path) for unit in self.anatomy.units[layer]} & self.cut.neurons.keys()
        experts = {unit_key(layer, block.path)} & self.cut.experts.keys() if block else set()
        heads = {unit_key(layer, attention.path)} & self.cut.heads.keys() if attention else set()
        return keys | {f"experts of {key}" for key in experts} | {f"heads of {key}" for key in heads}

    def _pass_dense(self, target: Walk, index: int) -> list[Tensor]:
        """Advance the dense stream; returns the outputs of the layer's projection where the refit needs them."""
        outputs: list[Tensor] = []
        unit = self._refit_unit(index)
        itself = unit is not None and index in self.cut.layers and self._scale_of(index, unit) is None
        if not itself and self._trail is not None and self._trail.restore(index, target.streams):
            return outputs
        with self.dense.layer(index) as layer:
            if unit is not None and index in self.cut.layers and self._scale(target, index, layer, unit) is None:
                with outputs_of(layer.get_submodule(unit.output), outputs.append):
                    target.pass_through(index, layer)
            else:
                target.pass_through(index, layer)
        return outputs

    def _refit_unit(self, layer: int) -> MlpUnit | None:
        return next((unit for unit in self.anatomy.units[layer] if unit.refit), None) if self.refit else None

    def _repair_heads(self, new: int, uncut: Tensors, stream: Walk) -> Repair | None:
        """Solve the attention's output projection again where groups of its heads go: for what those wrote."""
        old = self.cut.layers[new]
        unit = self.anatomy.attention[old]
        keep_G = self.cut.heads.get(unit_key(old, unit.path)) if unit else None
        if self.refit is None or unit is None or not unit.refit or keep_G is None:
            return None
        output = unit.tensors[-1]
        keep_K = rows_of(keep_G, uncut[output.name].shape[output.dim], output)
        equations = self.refit.open(self._folds.count)
        with self.dense.layer(old, uncut) as layer:
            for reading in read_uncut(stream, new, layer, unit, keep_K, 1.0):
                lost_BLD = reading.full_BLD.float() - reading.cut_BLD.float()
                self._add(equations, reading, lost_BLD, torch.zeros_like(lost_BLD))
        sum_over_processes(equations.sums())
        repair = equations.solve()
        if repair.delta_DF is not None:
            tensors = self.pruned.tensors(new)
            delta = repair.delta_DF if output.dim == 1 else repair.delta_DF.T
            tensors[output.name] = (tensors[output.name].float() + delta).to(tensors[output.name].dtype)
        return repair

    def _repair_up(
        self, new: int, unit: MlpUnit, scale: float | None, target: Walk, stream: Walk, wanted: list[Tensor]
    ) -> tuple[UpRepair, float] | None:
        """Solve the up projection again for what the cut layer misses, where neurons of its unit go.

        The repair, and the relative error without it. Not for removed layers alone: that helps on text like the
        calibration's and not on other.
        """
        narrowed = unit_key(self.cut.layers[new], unit.path) in self.cut.neurons
        if self.refit is None or not self.refit.up or unit.up is None or not narrowed or (scale is None and not wanted):
            return None
        error = RelativeError()
        with self.pruned.layer(new) as layer:
            down = layer.get_parameter(unit.tensors[-1].name)
            equations = UpEquations(down if unit.tensors[-1].dim == 1 else down.T, self._held_out, stream.room)
            for batch, reading in enumerate(read_gated(stream, new, layer, unit)):
                written_BLD = reading.written_BLD.float()
                behind_BLD = target.streams[batch].to(written_BLD) - reading.output_BLD.float()
                error.update(behind_BLD, target.streams[batch])
                if scale is not None:
                    missing_BLD = behind_BLD / scale
                else:  # a norm follows the output projection: match its own dense output instead
                    missing_BLD = wanted[batch].to(written_BLD).view_as(written_BLD) - written_BLD
                equations.update(reading.input_BLI, reading.gates_BLF, missing_BLD)
            repair = equations.solve()
        sum_over_processes(error.sums())
        if repair.delta_FI is not None:
            tensors = self.pruned.tensors(new)
            name = unit.up.tensor.name
            tensors[name] = add_to_strand(tensors[name], unit.up, repair.delta_FI)
        return repair, error.value()

    def _add(self, equations: NormalEquations, reading: Reading, lost_BLD: Tensor, inherited_BLD: Tensor) -> None:
        """Take a batch into the sums of each fold that has windows in it."""
        parts = self._folds.parts(reading.batch, reading.input_BLF, lost_BLD, inherited_BLD)
        for fold, (input_TF, lost_TD, inherited_TD) in parts:
            equations.update(input_TF, lost_TD, inherited_TD, fold)

    def _solve(
        self,
        new: int,
        uncut: Tensors,
        unit: MlpUnit,
        target: Walk,
        reached: Streams,
        stream: Walk,
        wanted: list[Tensor],
        moved: bool,
    ) -> tuple[Repair, float]:
        """The repair of the layer's output projection, and the relative error without it.

        ``moved``: its neurons are not those of the uncut layer any more.
        """
        assert self.refit is not None
        old = self.cut.layers[new]
        key = unit_key(old, unit.path)
        equations, error = self.refit.open(self._folds.count), RelativeError()
        with self.dense.layer(old, uncut) as layer:
            scale = self._scale_of(old, unit)
            if scale is not None and self._narrowed(old) <= {key} and not moved:
                readings = read_uncut(stream, new, layer, unit, self.cut.neurons.get(key), scale)
            else:
                readings = read_both(stream, new, layer, self.pruned, unit)
            for reading in readings:
                batch, device = reading.batch, reading.full_BLD.device
                target_BLD, reached_BLD = target.streams[batch].to(device), reached[batch].to(device)
                error.update(target_BLD - reading.cut_BLD, target_BLD)
                if scale is not None:
                    inherited_BLD = (reached_BLD - reading.full_BLD) / scale
                    lost_BLD = (reading.full_BLD - reading.cut_BLD + target_BLD - reached_BLD) / scale
                else:  # a norm follows the projection: match its own dense output instead
                    assert reading.full_written_BLD is not None
                    assert reading.cut_written_BLD is not None
                    inherited_BLD = wanted[batch].to(device).view_as(target_BLD) - reading.full_written_BLD
                    lost_BLD = reading.full_written_BLD - reading.cut_written_BLD
                self._add(equations, reading, lost_BLD, inherited_BLD)
        sum_over_processes([*equations.sums(), *error.sums()])
        return equations.solve(), error.value()

    def _advance(self, outputs: Outputs, target: Walk | None, stream: Walk) -> float | None:
        """Move the pruned stream on; returns its relative error, where there is a dense one to compare with."""
        error = RelativeError()
        for batch, output_BLD in outputs:
            if target is not None:
                error.update(target.streams[batch].to(output_BLD.device) - output_BLD, target.streams[batch])
            stream.advance(batch, output_BLD)
        if target is None:
            return None
        sum_over_processes(error.sums())
        return error.value()

    def _scale_of(self, index: int, unit: MlpUnit) -> float | None:
        return self._scales.get(_kind(self.dense.layers[index], unit))

    def _scale(self, walk: Walk, index: int, layer: nn.Module, unit: MlpUnit) -> float | None:
        """How much of the projection's output reaches the hidden states: a factor, or None if not linearly.

        Found by adding noise to the projection's output in one layer of each kind.
        """
        kind = _kind(layer, unit)
        if kind not in self._scales:
            self._scales[kind] = from_first(residual_scale(walk, index, layer, layer.get_submodule(unit.output)))
        return self._scales[kind]


def _kind(layer: nn.Module, unit: MlpUnit) -> str:
    return f"{type(layer).__name__}.{unit.output}"
