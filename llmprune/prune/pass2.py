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

import torch
from torch import Tensor, nn

from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.common.distributed import is_first_process, sum_over_processes, windows_of_process
from llmprune.common.process_memory import trim_if_large
from llmprune.common.progress import track
from llmprune.cut.decision import Cut
from llmprune.layerwise.cached_forward import CachedForward
from llmprune.layerwise.decoder import Decoder, Tensors
from llmprune.layerwise.forward import LayerwiseForward, require_same_calls
from llmprune.layerwise.hidden_states import HiddenStateStore
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.prune.dense_reference import pass_dense, record_dense
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
from llmprune.prune.sparsify import DenseTargets, Sparsifier
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity


@dataclass(frozen=True)
class Pruning:
    """Settings of a run of pass 2.

    ``write(new, tensors)`` gets every finished layer under its index in the pruned model, in the first process;
    ``follow(new, layer)`` in every process, before the layer is released. ``repairs``: those made in each layer where
    ``refit`` is set, in this order. ``seed``: of the training of whole layers. ``title``: of the progress.
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
        windows that judge ridge regressions; None: both halves.
        """
        folds = folds or Folds.of(len(windows_NL), None)
        steps = steps_of(self.cut, self.anatomy, refit=self.refit, sparsity=self.sparsity)
        mine_NL = windows_of_process(windows_NL)
        dense = LayerwiseForward(self.dense, mine_NL, batch_size=batch_size, store=store)
        pruned = LayerwiseForward(self.pruned, mine_NL, batch_size=batch_size, store=store)
        require_same_calls(dense, pruned, layers=self.cut.layers)
        progress = snapshots.load() if snapshots else Progress()
        records, scales = list(progress.records), ResidualScales(progress.scales)
        norms = FollowingNorms(scales)
        run = Pass2Context(
            cut=self.cut,
            refit=self.refit,
            dense=dense,
            pruned=pruned,
            folds=WindowGroups(folds.of_windows_N, batch_size, weights=folds.weights),
            held_out=WindowGroups(every_eighth(len(windows_NL)), batch_size),
            scales=scales,
            topologies=TopologyCache(self.anatomy, scales, norms=norms),
            norms=norms,
            cache=store.cache if store else None,
            training=self._training_windows(mine_NL, folds, batch_size=batch_size, store=store),
        )
        if snapshots and records:
            snapshots.restore(dense.hidden_states, pruned.hidden_states)
        elif steps[0].uses_dense:
            for index in range(steps[0].old):
                pass_dense(run, index)
        for new in track(range(len(records), len(steps)), self.title):
            records.append(self._prune_layer(run, steps[new]))
            if snapshots:
                snapshots.save(Progress(records, scales.known), dense.hidden_states, pruned=pruned.hidden_states)
        return records, pruned

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
            self._pass_untouched(run, step, weights=weights)
            return LayerRecord(step.old, 0.0, None)
        work = LayerWork(step, reference, weights, run.dense.hidden_states, CachedForward(run.pruned, {}))
        work.runs = self._runs(run, work)
        self._repair(run, work, stage=Stage.BEFORE_GAP)
        self._pass_gap(run, work)
        self._repair(run, work, stage=Stage.AFTER_GAP)
        work.drop_references()
        trim_if_large()  # of what the repairs freed, before the tensors to be written are made
        with self.pruned.layer(step.new, work.weights.cut) as layer:
            outputs = self._sparsify(run, work, layer=layer)
            self._advance(run, work, outputs=outputs)
            self._write(step, tensors_of(layer))
            if self.follow is not None:
                self.follow(step.new, layer)
        return work.outcome.record(step.old)

    def _pass_untouched(self, run: Pass2Context, step: LayerStep, *, weights: LayerWeights) -> None:
        """Write a layer before the first cut; its hidden states are the dense ones."""
        self._write(step, weights.cut)
        rounds_differently = self.dense.rounds_differently(step.old)
        if rounds_differently or self.follow is not None:
            with self.pruned.layer(step.new, weights.cut) as layer:
                if rounds_differently:
                    run.pruned.pass_through(step.new, layer)
                if self.follow is not None:
                    self.follow(step.new, layer)
        if rounds_differently:
            return
        dense = run.dense.hidden_states
        for batch in range(len(dense)):
            run.pruned.advance(batch, dense.at(batch, dense.device))

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
        if not step.refits_output or reference.unit is None:
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
        sparsifier = Sparsifier(sparsity, self.refit if step.refits_sparse else None, experts, run.folds)
        staged = StagedLayer(run.pruned, step.new, layer=layer, order=topology.order)
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

    def _write(self, step: LayerStep, tensors: Tensors) -> None:
        if self.write is not None and is_first_process():
            self.write(step.new, tensors)
