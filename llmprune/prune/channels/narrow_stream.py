"""Cut residual channels out of finished layers, and repair what reads and what writes the narrower stream.

The layer with all channels (wide) and the one with K of D channels (narrow) run side by side, stage by stage in the
order in which the layer calls its modules:

    norms      their weights are scaled, for they divide by the root of the mean over fewer channels
    readers    projections, routers and experts that share an input n read the narrow n' through one map M [D, K]:

                   minimise over M   ‖ n' Mᵀ − n ‖²        W' = W M

               so that a removed channel is predicted from the kept ones; for every W at once, because W M is also the
               least-squares solution of ‖ n' W'ᵀ − n Wᵀ ‖². Of n − n' the removed channels are what the cut lost, the
               difference of the kept ones is inherited, and only a cross-validated fraction of it is a target
    writers    output projections are solved again towards the kept channels of the dense hidden states

All by cross-validated ridge regression (``common.linalg.cross_validated_ridge``), on the narrow stream, so that later
stages see what earlier ones left.

Shapes: B batch, L sequence length, T tokens, D hidden size, K residual channels kept, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.projections import Projection, projections_of, set_weight, weight_of
from llmprune.anatomy.residual_channels import cut_channels, mix_inputs, norms_of, readers_of, scaled_norm
from llmprune.anatomy.types import HiddenDim, HiddenSize
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.common.distributed import broadcast_from_first, sum_over_processes
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.staged_layer import Order, StagedLayer, probe
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.prune.channels.norm_scale import NormScale
from llmprune.prune.channels.wide_reference import KeptChannels, WideLayer, first_readers
from llmprune.prune.layer_step import LayerStep
from llmprune.prune.relative_error import RelativeError
from llmprune.prune.repair.residual_writers import LayerTopology, TopologyCache, kind_of
from llmprune.prune.writer_targets import DenseTargets, targets_of
from llmprune.recipe.refit import Refit


@dataclass(frozen=True)
class NarrowStream:
    """The pruned model with the kept residual channels, built layer by layer from the one with all of them.

    ``forward``: its layer-wise forward pass. ``folds``: judge ridge regressions.
    """

    forward: LayerwiseForward
    hidden: HiddenSize
    keep_K: Tensor
    refit: Refit | None
    folds: WindowGroups
    topologies: TopologyCache
    _orders: dict[Any, Order] = field(default_factory=dict)

    @contextmanager
    def cut(
        self, wide: LayerwiseForward, step: LayerStep, *, layer: nn.Module, dense: HiddenStates
    ) -> Iterator[tuple[nn.Module, float]]:
        """Yield the narrow layer and the relative error of its output; advance the narrow hidden states.

        ``layer``: the finished wide one, whose hidden states ``wide`` are those before it. ``dense``: hidden states of
        the dense model after the layer and its gap.
        """
        dims = self.hidden.layers[step.old]
        tensors = cut_channels(tensors_of(layer), dims, keep_K=self.keep_K, size=self.hidden.size)
        with self.forward.decoder.layer(step.new, tensors) as own:
            order = self._order(wide, step.new, layer=layer, dims=dims)
            staged = StagedLayer(self.forward, step.new, layer=own, order=order)
            after = KeptChannels(dense, self.keep_K)
            if self.refit is not None:
                topology = self.topologies.topology(wide, step.new, layer=layer, old=step.old)
                self._repair(staged, WideLayer(wide, step.new, layer, topology, order, dims), after=after)
            yield own, self._advance(staged, after)

    def _order(self, wide: LayerwiseForward, index: int, *, layer: nn.Module, dims: Sequence[HiddenDim]) -> Order:
        """Return the order in which a layer calls its readers and output projections."""
        kind = kind_of(layer)
        if kind not in self._orders:
            writers = [one.name for one in projections_of(layer) if one.outputs == self.hidden.size]
            names = [*readers_of(dims), *writers]
            self._orders[kind] = broadcast_from_first(probe(wide, index, layer=layer, names=names))
        return self._orders[kind]

    def _repair(self, staged: StagedLayer, wide: WideLayer, *, after: HiddenStates) -> None:
        """Repair the narrow layer stage by stage. ``after``: kept channels of the dense hidden states after it."""
        norms, topology = norms_of(wide.dims), wide.topology
        scales = {name: NormScale(staged.layer.get_submodule(name), self.keep_K) for name in norms}
        reference = wide.record(self.keep_K, scales=scales)
        for name, scale in scales.items():
            parameter = tensor_of(staged.layer, norms[name].name)
            parameter.data = scaled_norm(parameter.data, norms[name], factor=scale.factor())
        projections = {one.name: one for one in projections_of(staged.layer)}
        groups, readers = first_readers(wide.order, wide.dims), readers_of(wide.dims)
        targets = DenseTargets(after, reference.written)
        for group in staged.order.groups:
            for name in group:
                if name in groups:
                    mixing_DK = self._solve_readers(staged, name, wide=reference.inputs[name])
                    for one in (one for reader in groups[name] for one in readers[reader]):
                        value = mix_inputs(tensor_of(wide.layer, one.name), one.dim, mixing_DK=mixing_DK)
                        tensor_of(staged.layer, one.name).data = value
                    staged.finish(name)
                elif topology.writer(name) is not None:
                    self._solve_writer(staged, projections[name], topology=topology, targets=targets)
                    staged.finish(name)

    def _solve_readers(self, staged: StagedLayer, name: str, *, wide: HiddenStates) -> Tensor:
        """Return M [D, K], the map from the narrow input of a group of readers to the wide one."""
        batches = ((batch, value, wide.at(batch, value.device)) for batch, value in staged.inputs(name, keep=True))
        return self.solve_map(batches, where=f"layer {staged.index}, the inputs of {name}")

    def solve_map(self, batches: Iterator[tuple[int, Tensor, Tensor]], *, where: str) -> Tensor:
        """Return the least-squares map M [D, K], pulled to the selection, from (batch number, narrow, wide) inputs."""
        assert self.refit is not None, "readers are solved only with refit in the recipe"
        equations = self.refit.make_equations(self.folds.count, one_source=self.folds.one_source)
        keep_K = self.keep_K
        for batch, narrow, wide_BLD in batches:
            keep_K = keep_K.to(narrow.device)
            narrow_BLK = narrow.view(*wide_BLD.shape[:2], -1)
            for fold, (input_TK, wanted_TD) in self.folds.parts(batch, narrow_BLK.float(), wide_BLD.float()):
                inherited_TK = wanted_TD.index_select(1, keep_K) - input_TK
                lost_TD = wanted_TD.index_fill(1, keep_K, 0.0)
                inherited_TD = torch.zeros_like(wanted_TD).index_copy_(1, keep_K, inherited_TK)
                equations.update(input_TK, lost_TD, inherited_TD=inherited_TD, fold=fold)
        sum_over_processes(equations.reducible_state())
        selection_DK = torch.zeros(self.hidden.size, len(keep_K), device=keep_K.device)
        selection_DK[keep_K, torch.arange(len(keep_K), device=keep_K.device)] = 1
        delta_DK = equations.solve(where).delta_DF
        return selection_DK if delta_DK is None else selection_DK + delta_DK

    def _solve_writer(
        self, staged: StagedLayer, projection: Projection, *, topology: LayerTopology, targets: DenseTargets
    ) -> None:
        """Solve an output projection again towards the kept channels of what the dense model has after it."""
        assert self.refit is not None, "writers are solved only with refit in the recipe"
        writer = topology.writer(projection.name)
        assert writer is not None, "it writes to the stream"
        weight_KI = weight_of(staged.layer, projection).float()
        equations = self.refit.make_equations(self.folds.count, one_source=self.folds.one_source)
        for one in targets_of(staged, writer, targets=targets):
            for fold, (input_TI, target_TK) in self.folds.parts(one.batch, one.input_BLI, one.target_BLD):
                equations.update(input_TI, None, inherited_TD=target_TK, fold=fold)
        sum_over_processes(equations.reducible_state())
        equations.subtract_current_output(weight_KI)
        delta_KI = equations.solve(f"layer {staged.index}, {projection.name}").delta_DF
        if delta_KI is not None:
            set_weight(staged.layer, projection, weight_OI=weight_KI + delta_KI)

    def _advance(self, staged: StagedLayer, after: HiddenStates) -> float:
        error = RelativeError()
        for batch, output_BLK in staged.outputs():
            wanted_BLK = after.at(batch, output_BLK.device)
            error.update(wanted_BLK - output_BLK, wanted_BLK)
            self.forward.advance(batch, output_BLK)
        sum_over_processes(error.reducible_state())
        return error.value()
