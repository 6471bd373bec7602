"""Pass 2: walk dense and pruned side by side; cut, refit and write each layer, then let it go.

Two streams of hidden states run in step. The dense one says what each point of
the network should put out, the pruned one what the network being built does. A
removed layer is folded into the kept layer before it: that layer's target is the
dense stream after the gap. Kept layers behind a gap are repaired in two steps, the
token mixer (``mixers``) and then what ends the layer (``repairs``).

Shapes: N windows, B batch, L sequence length, D hidden size, F neurons kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llmprune.anatomy.types import Anatomy, MlpUnit, Unit, unit_key
from llmprune.checkpoint.loading import tensors_of
from llmprune.common.distributed import is_first_process, sum_over_processes, windows_of_process
from llmprune.common.linalg.cross_validated_ridge import Repair
from llmprune.common.progress import track
from llmprune.cut.apply import add_to_output
from llmprune.cut.decision import Cut, gap_after
from llmprune.layerwise.cached_forward import Reruns
from llmprune.layerwise.forward import Decoder, LayerwiseForward, Tensors, require_same_calls
from llmprune.layerwise.hidden_states import HiddenStateCache, HiddenStates, HiddenStateStore
from llmprune.layerwise.residual_scale import RelativeError
from llmprune.prune.repair.folds import Folds, every_eighth, folds_of
from llmprune.prune.repair.output_projection import Repairs, cut_parts
from llmprune.prune.repair.residual_writers import TopologyCache
from llmprune.prune.repair.token_mixer import DenseMixerOutput, Mixers
from llmprune.prune.repair.up_projection import UpRepair
from llmprune.prune.snapshots import LayerRecord, MatrixRecord, Snapshots
from llmprune.prune.sparsify import Sparsifier, Targets
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity

Outputs = Iterator[tuple[int, Tensor]]  # batch number, hidden states


class Pruning:
    """One run of pass 2. ``write`` gets every finished layer's tensors under the layer's new index."""

    def __init__(
        self,
        dense: Decoder,
        pruned: Decoder,
        *,
        anatomy: Anatomy,
        cut: Cut,
        refit: Refit | None,
        write: Callable[[int, Tensors], None],
        sparsity: Sparsity | None = None,
    ) -> None:
        self.dense, self.pruned, self.anatomy, self.cut = dense, pruned, anatomy, cut
        self.refit, self.write, self.sparsity = refit, write, sparsity
        self._trail: HiddenStateCache | None = None

    @torch.no_grad()
    def run(
        self,
        windows_NL: Tensor,
        batch_size: int,
        *,
        snapshots: Snapshots | None = None,
        store: HiddenStateStore | None = None,
        sources_N: Tensor | None = None,
    ) -> tuple[list[LayerRecord], LayerwiseForward]:
        """Prune every kept layer; returns what was repaired, and the pruned stream after the last layer.

        With snapshots, layers that an earlier run finished are not done again. ``sources_N`` says which source
        each window is from.
        """
        self._trail = store.trail if store else None
        mine_NL = windows_of_process(windows_NL)
        folds = Folds(folds_of(len(windows_NL), sources_N), batch_size)
        target = LayerwiseForward(self.dense, mine_NL, batch_size=batch_size, store=store)
        stream = LayerwiseForward(self.pruned, mine_NL, batch_size=batch_size, store=store)
        require_same_calls(target, stream, layers=self.cut.layers)
        records = snapshots.records() if snapshots else []
        scales = snapshots.scales if snapshots else {}
        held_out = Folds(every_eighth(len(windows_NL)), batch_size)
        self._repairs = Repairs(
            self.refit,
            self.dense,
            pruned=self.pruned,
            anatomy=self.anatomy,
            cut=self.cut,
            folds=folds,
            held_out=held_out,
            scales=scales,
        )
        self._mixers = Mixers(
            self.refit, self.dense, pruned=self.pruned, anatomy=self.anatomy, cut=self.cut, folds=folds
        )
        self._outlines = TopologyCache(self.anatomy, scales, writers=True)
        self._sparsifier = self._make_sparsifier(folds, scales)
        if snapshots and records:
            snapshots.restore(target.streams, stream.streams)
        elif self._needs_dense():
            for index in range(self.cut.layers[0]):
                self._pass_dense(target, index)
        for new in track(range(len(records), len(self.cut.layers)), "pass 2: cut and refit"):
            records.append(self._prune_layer(new, target, stream=stream))
            if snapshots:
                snapshots.keep(records, target.streams, stream=stream.streams)
        return records, stream

    def _make_sparsifier(self, folds: Folds, scales: dict[str, float | None]) -> Sparsifier | None:
        if self.sparsity is None:
            return None
        experts = self.cut.num_experts or (self.anatomy.experts.count if self.anatomy.experts else None)
        return Sparsifier(self.sparsity, self.refit, anatomy=self.anatomy, experts=experts, folds=folds, scales=scales)

    def _needs_dense(self) -> bool:
        """Whether something is measured against the dense stream: a cut, or the refit of sparse matrices."""
        return self._sparsifier is None or self._sparsifier.refit is not None or not self.cut.is_empty

    def _prune_layer(self, new: int, target: LayerwiseForward, *, stream: LayerwiseForward) -> LayerRecord:
        if self._sparsifier and self._sparsifier.refit is not None:
            return self._sparsify_towards(self._sparsifier, new, target=target, stream=stream)
        if not self._needs_dense():
            return self._sparsify_alone(new, stream)
        old = self.cut.layers[new]
        gap = gap_after(self.cut.layers, new, num_layers=self.cut.num_layers)
        heard, unit = self._listen(new, target)
        wanted = self._pass_dense(target, old, unit=unit)
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
        mixer = None
        if heard is not None:
            uncut, mixer = self._mixers.solve(new, uncut, stream=stream, heard=heard)
            heard = None  # what it holds of every window
        runs = self._reruns(new, uncut, stream=stream, unit=unit)
        reached = target.copy() if gap and unit else target.streams  # the dense stream before the gap
        for index in gap:
            self._pass_dense(target, index)
        repair = up = error_cut = None
        if unit is not None:
            if isinstance(unit, MlpUnit):
                up = self._repairs.up(
                    new, unit, scale=self._repairs.scale_of(old, unit), target=target, runs=runs, wanted=wanted
                )
            moved = up is not None and up[0].delta_FI is not None
            repair, error_cut = self._repairs.output(
                new, uncut, unit=unit, target=target, reached=reached, runs=runs, wanted=wanted, moved=moved
            )
            error_cut = up[1] if up else error_cut
        del uncut, reached, wanted
        with self.pruned.layer(new) as layer:
            if repair is not None and unit is not None and repair.delta_DF is not None:
                add_to_output(layer, unit, delta_DF=repair.delta_DF)
            error, matrices = self._finish(new, layer, target=target, runs=runs)
        return self._record(
            old, error_cut, error=error, repair=repair, mixer=mixer, up=up[0] if up else None, matrices=matrices
        )

    def _reruns(self, new: int, uncut: Tensors, *, stream: LayerwiseForward, unit: Unit | None) -> Reruns:
        """Runs of a kept layer, uncut and cut, on the pruned stream. Where it only loses neurons of one unit, the
        modules before that are run once.
        """
        old = self.cut.layers[new]
        lost = cut_parts(old, self.anatomy, cut=self.cut)
        if unit is None or lost - {unit_key(old, unit.path)} or self.dense.rounds_otherwise(old) or self._sparsifier:
            return Reruns(stream, {})
        with self.dense.layer(old, uncut) as layer:
            order = self._outlines.order(stream, new, layer=layer)
        return Reruns(stream, order.before(unit.output, [cut.name for cut in unit.tensors]))

    @staticmethod
    def _record(
        layer: int,
        error_cut: float | None,
        *,
        error: float | None,
        repair: Repair | None,
        mixer: Repair | None,
        up: UpRepair | None,
        matrices: tuple[MatrixRecord, ...],
    ) -> LayerRecord:
        if repair is None and (mixer is None or mixer.delta_DF is None):  # nothing was refit: the error is the cut's
            error_cut, error = error, None
        return LayerRecord(
            layer,
            error_cut,
            error,
            ridge=repair.ridge if repair else None,
            inherited=repair.inherited if repair else None,
            held_out=repair.held_out if repair else None,
            mixer_held_out=mixer.held_out if mixer else None,
            up_held_out=up.held_out if up else None,
            matrices=matrices,
        )

    def _finish(
        self, new: int, layer: nn.Module, *, target: LayerwiseForward | None, runs: Reruns
    ) -> tuple[float | None, tuple[MatrixRecord, ...]]:
        """Make the layer sparse where that is asked for, run it, and write it."""
        stream, matrices = runs.walk, tuple[MatrixRecord, ...]()
        outputs: Outputs = ((batch, output_BLD) for batch, _, output_BLD in runs.outputs(new, layer))
        if self._sparsifier:
            outline = self._sparsifier.outlines.of(stream, new, layer=layer, old=self.cut.layers[new])
            staged, matrices, _ = self._sparsifier.prune(stream, new, layer=layer, outline=outline, targets=None)
            outputs = staged.outputs()
        error = self._advance(outputs, target, stream=stream)
        self._write(new, tensors_of(layer))
        self.pruned.forget()
        return error, matrices

    def _sparsify_alone(self, new: int, stream: LayerwiseForward) -> LayerRecord:
        """Make a layer sparse that nothing was cut from, without a look at the dense stream."""
        with self.pruned.layer(new) as layer:
            _, matrices = self._finish(new, layer, target=None, runs=Reruns(stream, {}))
        return LayerRecord(self.cut.layers[new], None, None, matrices=matrices)

    def _sparsify_towards(
        self, sparsifier: Sparsifier, new: int, *, target: LayerwiseForward, stream: LayerwiseForward
    ) -> LayerRecord:
        """Cut a layer, make it sparse, and repair it for both at once."""
        old = self.cut.layers[new]
        targets = Targets(target.streams)
        with self.dense.layer(old) as layer:
            outline = sparsifier.outlines.of(target, old, layer=layer, old=old)
            with sparsifier.listening(target, layer, outline=outline, targets=targets):
                target.pass_through(old, layer)
        uncut = self.dense.tensors(old)
        self.pruned.tensors(new)  # cut out of the dense layer while that is at hand, and held
        self.dense.forget()
        mixer = None
        writer = self._mixers.writer(new, outline) if self.refit and self.refit.up else None
        if writer is not None and not writer.last:
            heard = DenseMixerOutput(outline, writer, targets.written[writer.name])
            _, mixer = self._mixers.solve(new, uncut, stream=stream, heard=heard)
        del uncut
        for index in gap_after(self.cut.layers, new, num_layers=self.cut.num_layers):
            self._pass_dense(target, index)
        unit, up = self._repairs.mlp(old), None
        writer = next((one for one in outline.writers if unit is not None and one.name == unit.output), None)
        if unit is not None and writer is not None:
            runs = Reruns(stream, {})
            up = self._repairs.up(
                new, unit, scale=writer.scale, target=target, runs=runs, wanted=targets.written.get(writer.name)
            )
        with self.pruned.layer(new) as layer:
            staged, matrices, repair = sparsifier.prune(stream, new, layer=layer, outline=outline, targets=targets)
            error = self._advance(staged.outputs(), target, stream=stream)
            self._write(new, tensors_of(layer))
        self.pruned.forget()
        return self._record(
            old, None, error=error, repair=repair, mixer=mixer, up=up[0] if up else None, matrices=matrices
        )

    def _write(self, new: int, tensors: Tensors) -> None:
        if is_first_process():
            self.write(new, tensors)

    def _is_untouched(self, new: int) -> bool:
        """Whether nothing is cut up to this layer and in the gap after it: then both streams are one."""
        if self._sparsifier:
            return False
        first_gap = next((index for index in range(self.cut.num_layers) if index not in self.cut.layers), None)
        old = self.cut.layers[new]
        narrowed = any(cut_parts(index, self.anatomy, cut=self.cut) for index in self.cut.layers[: new + 1])
        return not narrowed and (first_gap is None or first_gap > old + 1)

    def _listen(self, new: int, target: LayerwiseForward) -> tuple[DenseMixerOutput | None, Unit | None]:
        """What the dense layer's token mixer says, where that is solved again, and the unit that is refit after it:
        an MLP, or without one the last that writes to the hidden states.
        """
        old = self.cut.layers[new]
        unit: Unit | None = self._repairs.mlp(old)
        if self.refit is None or self._is_untouched(new) or not (unit is None or self._mixers.has_work(new)):
            return None, unit
        with self.dense.layer(old) as layer:
            outline = self._outlines.of(target, old, layer=layer, old=old)
            writer = self._mixers.writer(new, outline)
            heard = self._mixers.listen(target, old, layer=layer, outline=outline, writer=writer) if writer else None
        if unit is None:
            unit = next((one.unit for one in outline.writers if one.last), None)
        return heard, unit

    def _pass_dense(self, target: LayerwiseForward, index: int, *, unit: Unit | None = None) -> HiddenStates | None:
        """Advance the dense stream; returns the outputs of the unit's projection where its refit needs them."""
        itself = unit is not None and self._repairs.scale_of(index, unit) is None
        if not itself and self._trail is not None and self._trail.restore(index, target.streams):
            return None
        with self.dense.layer(index) as layer:
            if unit is not None and self._repairs.scale(target, index, layer=layer, unit=unit) is None:
                return target.pass_and_keep(index, layer, projection=layer.get_submodule(unit.output))
            target.pass_through(index, layer)
        return None

    def _advance(self, outputs: Outputs, target: LayerwiseForward | None, *, stream: LayerwiseForward) -> float | None:
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
