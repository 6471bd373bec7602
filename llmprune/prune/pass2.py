"""Pass 2: cut, repair, sparsify and write every kept layer, one after the other.

Dense and pruned hidden states advance together, layer by layer. The dense ones are what each layer should produce, the
pruned ones what the new model produces. A removed layer is absorbed by the kept layer before it, whose target is the
dense hidden states after the gap. Each kept layer goes through these stages:

    1. record the dense layer's outputs (``dense_reference``)
    2. cut the layer's weights out of the dense ones (``layer_weights``)
    3. refit the token mixer (``repair``)
    4. advance the dense hidden states over the gap
    5. refit the up projection, then the output projection, then train the whole layer if asked for (``repair``)
    6. make the matrices sparse (``sparsify``)
    7. advance the pruned hidden states, and write the layer

``LayerStep`` decides which of them a layer needs.

Shapes: N windows, B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.anatomy.types import Anatomy, routed_units
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.common.distributed import is_first_process, sum_over_processes, windows_of_process
from llmprune.common.process_memory import trim_if_large
from llmprune.common.progress import track
from llmprune.cut.decision import Cut
from llmprune.layerwise.cached_forward import CachedForward
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.layerwise.forward import LayerwiseForward, require_same_calls
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.prune.channels.narrow_stream import NarrowStream
from llmprune.prune.channels.outside_layers import repair_outside
from llmprune.prune.dense_reference import pass_dense, record_dense
from llmprune.prune.free_channels.finder import ChannelFinder
from llmprune.prune.layer_step import LayerStep, steps_of
from llmprune.prune.layer_weights import LayerWeights
from llmprune.prune.layer_work import LayerWork, Pass2Context
from llmprune.prune.records import LayerRecord
from llmprune.prune.relative_error import RelativeError
from llmprune.prune.repair.base import LayerRepair, Stage
from llmprune.prune.repair.folds import Folds, every_eighth
from llmprune.prune.repair.following_norm import FollowingNorms
from llmprune.prune.repair.registry import REPAIRS
from llmprune.prune.repair.residual_scales import ResidualScales
from llmprune.prune.repair.residual_writers import LayerTopology, TopologyCache
from llmprune.prune.repair.training_windows import TrainingWindows
from llmprune.prune.snapshots import Progress, Snapshots
from llmprune.prune.sparsify import Sparsifier
from llmprune.prune.writer_targets import DenseTargets
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity


@dataclass(frozen=True)
class Pruning:
    """Settings of a run of pass 2.

    ``write(new, tensors)`` gets every finished layer under its index in the pruned model, in the first process;
    ``follow(new, layer)`` in every process, before the layer is released. ``repairs``: those made in each layer where
    ``refit`` is set, in this order. ``seed``: of the training of whole layers. ``narrow``: the pruned model with the
    kept residual channels, where some are removed: its layers are those that are written. ``title``: of the progress.
    """

    dense: Decoder
    pruned: Decoder
    _: KW_ONLY
    anatomy: Anatomy
    cut: Cut
    refit: Refit | None
    write: Callable[[int, Tensors], None] | None = None
    follow: Callable[[int, nn.Module], None] | None = None
    sparsity: Sparsity | None = None
    repairs: tuple[LayerRepair, ...] = REPAIRS
    seed: int = 0
    narrow: Decoder | None = None
    title: str = "pass 2: cut and refit"

    @torch.no_grad()
    def run(
        self,
        windows_NL: Tensor,
        batch_size: int,
        *,
        snapshots: Snapshots | None = None,
        store: HiddenStateStore | None = None,
        folds: Folds | None = None,
    ) -> tuple[list[LayerRecord], LayerwiseForward]:
        """Prune every kept layer; return their records, and the pruned model after its last layer.

        With ``snapshots``, layers that an earlier run finished are not done again. ``folds``: those of the
        windows that judge ridge regressions; None: the most different halves.
        """
        folds = folds or Folds.of(windows_NL, None)
        steps = steps_of(self.cut, self.anatomy, refit=self.refit, sparsity=self.sparsity)
        progress = snapshots.load() if snapshots else Progress()
        records, scales = list(progress.records), ResidualScales(progress.scales)
        run = self._context(windows_NL, batch_size, store=store, folds=folds, scales=scales)
        streams = [one.hidden_states for one in (run.dense, run.pruned)]
        if run.narrow is not None:
            streams.append(run.narrow.forward.hidden_states)
        if snapshots and records:
            snapshots.restore(streams)
        elif steps[0].uses_dense:
            for index in range(steps[0].old):
                pass_dense(run, index)
        for new in track(range(len(records), len(steps)), self.title):
            records.append(self._prune_layer(run, steps[new]))
            if snapshots:
                snapshots.save(Progress(records, scales.known), streams)
        if run.narrow is None:
            return records, run.pruned
        if self.refit is not None:
            repair_outside(run.narrow, run.pruned)
        return records, run.narrow.forward

    def _context(
        self,
        windows_NL: Tensor,
        batch_size: int,
        *,
        store: HiddenStateStore | None,
        folds: Folds,
        scales: ResidualScales,
    ) -> Pass2Context:
        """Return what all layers share: the forward passes at their first layer, and what is measured only once."""
        mine_NL = windows_of_process(windows_NL)
        forward = partial(LayerwiseForward, batch_size=batch_size, store=store)
        dense, pruned, narrow = forward(self.dense, mine_NL), forward(self.pruned, mine_NL), None
        require_same_calls(dense, pruned, layers=self.cut.layers)
        if self.narrow is not None:
            narrow = forward(self.narrow, mine_NL)
            require_same_calls(pruned, narrow, layers=range(len(self.pruned)))
        norms = FollowingNorms(scales)
        topologies = TopologyCache(self.anatomy, scales, norms=norms)
        judged = WindowGroups(folds.of_windows_N, batch_size, weights=folds.weights, one_source=not folds.are_sources)
        return Pass2Context(
            cut=self.cut,
            refit=self.refit,
            dense=dense,
            pruned=pruned,
            folds=judged,
            held_out=WindowGroups(every_eighth(len(windows_NL)), batch_size),
            scales=scales,
            topologies=topologies,
            norms=norms,
            channels=ChannelFinder(self.sparsity),
            cache=store.cache if store else None,
            training=self._training_windows(mine_NL, folds, batch_size=batch_size, store=store),
            narrow=None if narrow is None else self._narrow_stream(narrow, judged, topologies=topologies),
        )

    def _narrow_stream(
        self, narrow: LayerwiseForward, folds: WindowGroups, *, topologies: TopologyCache
    ) -> NarrowStream:
        hidden, keep_K = self.anatomy.hidden, self.cut.hidden
        assert hidden is not None, "the anatomy of a cut of channels has them"
        assert keep_K is not None
        return NarrowStream(narrow, hidden, keep_K, self.refit, folds, topologies)

    def _training_windows(
        self, mine_NL: Tensor, folds: Folds, *, batch_size: int, store: HiddenStateStore | None
    ) -> TrainingWindows | None:
        """Return the windows that layers are trained on, if they are and some are left to judge it."""
        if self.refit is None or not self.refit.block or len(folds.of_windows_N) < 2:
            return None
        alone = LayerwiseForward(self.pruned, mine_NL, batch_size=1, store=store)
        return TrainingWindows(alone.calls, folds, batch_size=batch_size, seed=self.seed)

    def _prune_layer(self, run: Pass2Context, step: LayerStep) -> LayerRecord:
        """Take one kept layer through all stages."""
        reference = record_dense(run, step)
        weights = LayerWeights.cut_out(step, self.dense, pruned=self.pruned)
        if step.is_untouched:
            return self._pass_untouched(run, step, weights=weights)
        work = LayerWork(step, reference, weights, run.dense.hidden_states, CachedForward(run.pruned, {}))
        work.runs = self._runs(run, work)
        self._repair(run, work, stage=Stage.BEFORE_GAP)
        self._pass_gap(run, work)
        self._repair(run, work, stage=Stage.AFTER_GAP)
        work.drop_references()
        trim_if_large()  # of what the repairs freed, before the tensors to be written are made
        with self.pruned.layer(step.new, work.weights.cut) as layer:
            outputs = self._sparsify(run, work, layer=layer)
            narrow_error = self._finish(run, step, layer=layer) if run.narrow else None
            self._advance(run, work, outputs=outputs)
            if run.narrow is None:
                self._finish(run, step, layer=layer)
        return work.outcome.record(step.old).with_narrow_error(narrow_error, repaired=self.refit is not None)

    def _pass_untouched(self, run: Pass2Context, step: LayerStep, *, weights: LayerWeights) -> LayerRecord:
        """Write a layer before the first cut of layers or units; its hidden states are the dense ones."""
        rounds_differently = self.dense.rounds_differently(step.old)
        with self.pruned.layer(step.new, weights.cut) as layer:
            narrow_error = self._finish(run, step, layer=layer)
            if rounds_differently:
                run.pruned.pass_through(step.new, layer)
        if not rounds_differently:
            dense = run.dense.hidden_states
            for batch in range(len(dense)):
                run.pruned.advance(batch, dense.at(batch, dense.device))
        return LayerRecord(step.old, 0.0, None).with_narrow_error(narrow_error, repaired=self.refit is not None)

    def _finish(self, run: Pass2Context, step: LayerStep, *, layer: nn.Module) -> float | None:
        """Write a layer whose weights are final; where channels are removed, cut them out of it first.

        Return the relative error of the narrow layer's output, if there is one: the hidden states before the layer are
        then not advanced yet.
        """
        if run.narrow is None:
            self._write_final(step, layer)
            return None
        with run.narrow.cut(run.pruned, step, layer=layer, dense=run.dense.hidden_states) as (own, error):
            self._write_final(step, own)
        return error

    def _write_final(self, step: LayerStep, layer: nn.Module) -> None:
        if self.write is not None and is_first_process():
            self.write(step.new, tensors_of(layer))
        if self.follow is not None:
            self.follow(step.new, layer)

    def _repair(self, run: Pass2Context, work: LayerWork, *, stage: Stage) -> None:
        """Make the repairs of one stage in their order."""
        if not work.step.is_refit:
            return
        for repair in self.repairs:
            if repair.stage is stage:
                repair.apply(run, work)

    def _pass_gap(self, run: Pass2Context, work: LayerWork) -> None:
        """Advance the dense hidden states over the removed layers after this one; those before them are kept for the
        refit of the output projection.
        """
        step, reference = work.step, work.dense
        if not step.refits_output or (reference.unit is None and step.experts is None):
            work.weights.drop_uncut()
        elif step.gap:
            work.before_gap = run.dense.copy()
        for index in step.gap:
            pass_dense(run, index)

    def _runs(self, run: Pass2Context, work: LayerWork) -> CachedForward:
        """Return runs of the layer, uncut and cut, on the pruned hidden states.

        If it loses neurons of one unit only, the modules before that unit run once.
        """
        step, unit = work.step, work.dense.unit
        once = step.refits_output and not self.dense.rounds_differently(step.old) and not step.is_sparse
        if unit is None or not once:
            return CachedForward(run.pruned, {})
        with self.dense.layer(step.old, work.weights.uncut) as layer:
            order = run.topologies.order(run.pruned, step.new, layer=layer)
        unchanged: dict[str, int] = {}
        if step.cuts_only(unit):
            unchanged = order.before(unit.output, [tensor.name for tensor in unit.tensors])
        return CachedForward(run.pruned, unchanged, last=order.owners.get(unit.output))

    def _sparsify(self, run: Pass2Context, work: LayerWork, *, layer: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Make the layer's matrices sparse if asked for; return (batch number, hidden states after the layer)."""
        step, sparsity = work.step, self.sparsity
        if sparsity is None:
            return ((batch, output_BLD) for batch, _, output_BLD in work.runs.final_outputs(step.new, layer))
        topology = work.dense.topology if step.refits_sparse else None
        if topology is None:
            topology = LayerTopology(run.topologies.agreed_order(run.pruned, step.new, layer=layer))
        experts = self.cut.num_experts or (self.anatomy.experts.count if self.anatomy.experts else None)
        refit, routed = self.refit if step.refits_sparse else None, routed_units(self.anatomy, step.old)
        units, order = self.anatomy.units[step.old], topology.order
        channels = run.channels.of(run.pruned, step.new, layer=layer, units=units, order=order, experts=experts)
        sparsifier = Sparsifier(sparsity, refit, experts, run.folds, channels, next(iter(routed), None))
        staged = StagedLayer(run.pruned, step.new, layer=layer, order=order)
        targets = DenseTargets(run.dense.hidden_states, work.dense.outputs)
        sparse = sparsifier.prune(staged, topology, targets=targets)
        work.outcome.matrices = sparse.matrices
        if step.refits_sparse:
            work.outcome.output = sparse.repair
        return staged.outputs()

    def _advance(self, run: Pass2Context, work: LayerWork, *, outputs: Iterator[tuple[int, Tensor]]) -> None:
        """Advance the pruned hidden states, and measure their error where there are dense ones."""
        error = RelativeError()
        for batch, output_BLD in outputs:
            if work.step.uses_dense:
                dense_BLD = run.dense.hidden_states.at(batch, output_BLD.device)
                error.update(dense_BLD - output_BLD, dense_BLD)
            run.pruned.advance(batch, output_BLD)
        if work.step.uses_dense:
            sum_over_processes(error.reducible_state())
            work.outcome.error = error.value()
