"""Pass 2: walk dense and pruned side by side; cut, refit and write each layer, then let it go.

Two streams of hidden states run in step. The dense one says what each point of
the network should put out, the pruned one what the network being built does. A
removed layer is folded into the kept layer before it: that layer's target is the
dense stream after the gap.

Shapes: N windows, B batch, L sequence length, D hidden size, F neurons kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmprune.anatomy.value import Anatomy, MlpUnit
from llmprune.cut import Cut, gap_after
from llmprune.model.loading import tensors_of
from llmprune.model.processes import from_first, is_first, share_of, sum_over_processes
from llmprune.model.streams import StreamStore
from llmprune.model.walk import Decoder, Tensors, Walk, inputs_of, outputs_of
from llmprune.progress import track
from llmprune.refit import Refit
from llmprune.residual import RelativeError, residual_scale
from llmprune.snapshots import LayerRecord, Snapshots


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
    ) -> None:
        self.dense, self.pruned, self.anatomy, self.cut = dense, pruned, anatomy, cut
        self.refit, self.write = refit, write
        self._scales: dict[str, float | None] = {}

    @torch.no_grad()
    def run(
        self, windows_NL: Tensor, batch_size: int, snapshots: Snapshots | None = None, store: StreamStore | None = None
    ) -> tuple[list[LayerRecord], Walk]:
        """Prune every kept layer; returns what was repaired, and the pruned stream after the last layer.

        With snapshots, layers that an earlier run finished are not done again.
        """
        mine_NL = share_of(windows_NL)
        target = Walk(self.dense, mine_NL, batch_size, store)
        stream = Walk(self.pruned, mine_NL, batch_size, store)
        records = snapshots.records() if snapshots else []
        if snapshots:
            self._scales = snapshots.scales
        if snapshots and records:
            snapshots.restore(len(records), target.streams, stream.streams)
        else:
            for index in range(self.cut.layers[0]):
                self._pass_dense(target, index)
        for new in track(range(len(records), len(self.cut.layers)), "pass 2: cut and refit"):
            records.append(self._prune_layer(new, target, stream))
            if snapshots:
                snapshots.keep(records, target.streams, stream.streams)
        return records, stream

    def _prune_layer(self, new: int, target: Walk, stream: Walk) -> LayerRecord:
        old = self.cut.layers[new]
        wanted = self._pass_dense(target, old)
        tensors = self.pruned.tensors(new)  # cut out of the dense layer while that is at hand
        self.dense.forget()
        for index in gap_after(self.cut.layers, new, self.cut.num_layers):
            self._pass_dense(target, index)
        if self._is_untouched(new):
            for batch, hidden_BLD in enumerate(target.streams):
                stream.advance(batch, hidden_BLD)
            self._write(new, tensors)
            return LayerRecord(old, 0.0, None)
        with self.pruned.layer(new) as layer:
            record = self._repair(new, layer, target, stream, wanted)
            self._write(new, tensors_of(layer))
        self.pruned.forget()
        return record

    def _write(self, new: int, tensors: Tensors) -> None:
        if is_first():
            self.write(new, tensors)

    def _is_untouched(self, new: int) -> bool:
        """Whether nothing is cut up to this layer and in the gap after it: then both streams are one."""
        first_gap = next((index for index in range(self.cut.num_layers) if index not in self.cut.layers), None)
        old = self.cut.layers[new]
        narrowed = any(self._is_narrowed(index) for index in self.cut.layers[: new + 1])
        return not narrowed and (first_gap is None or first_gap > old + 1)

    def _is_narrowed(self, layer: int) -> bool:
        return bool(self.cut.neurons) and bool(self.anatomy.units[layer])

    def _pass_dense(self, target: Walk, index: int) -> list[Tensor]:
        """Advance the dense stream; returns the outputs of the layer's projection where the refit needs them."""
        outputs: list[Tensor] = []
        unit = self._refit_unit(index)
        with self.dense.layer(index) as layer:
            if unit is not None and index in self.cut.layers and self._scale(target, index, layer, unit) is None:
                with outputs_of(layer.get_submodule(unit.output), outputs.append):
                    target.pass_through(index, layer)
            else:
                target.pass_through(index, layer)
        return outputs

    def _refit_unit(self, layer: int) -> MlpUnit | None:
        units = self.anatomy.units[layer]
        return units[0] if units and self.refit else None

    def _repair(self, new: int, layer: nn.Module, target: Walk, stream: Walk, wanted: list[Tensor]) -> LayerRecord:
        """Refit the layer's output projection, if it has one, and advance the pruned stream."""
        old = self.cut.layers[new]
        unit = self._refit_unit(old)
        if unit is None or self.refit is None:
            return LayerRecord(old, self._advance(new, layer, target, stream), None)
        output = layer.get_submodule(unit.output)
        equations, error = self.refit.open(), RelativeError()
        seen: list[Tensor] = []
        written: list[Tensor] = []
        with inputs_of(output, seen.append), outputs_of(output, written.append):
            for batch, _, output_BLD in stream.outputs(new, layer):
                missing_BLD = target.streams[batch].to(output_BLD.device) - output_BLD
                error.update(missing_BLD, target.streams[batch])
                if wanted:  # a norm follows the projection: match its own dense output instead
                    missing_BLD = wanted[batch].to(output_BLD.device) - written.pop()
                equations.update(seen.pop().flatten(0, -2), missing_BLD.flatten(0, -2))
                written.clear()
        sum_over_processes([*equations.sums(), *error.sums()])
        delta_DF = equations.solve() / (self._scales[type(layer).__name__] or 1.0)
        weight = output.get_parameter("weight")
        delta = delta_DF if unit.output_dim == 1 else delta_DF.T
        weight.data = (weight.float() + delta).to(weight.dtype)
        return LayerRecord(old, error.value(), self._advance(new, layer, target, stream))

    def _advance(self, new: int, layer: nn.Module, target: Walk, stream: Walk) -> float:
        error = RelativeError()
        for batch, _, output_BLD in stream.outputs(new, layer):
            error.update(target.streams[batch].to(output_BLD.device) - output_BLD, target.streams[batch])
            stream.advance(batch, output_BLD)
        sum_over_processes(error.sums())
        return error.value()

    def _scale(self, walk: Walk, index: int, layer: nn.Module, unit: MlpUnit) -> float | None:
        """How much of the projection's output reaches the hidden states: a factor, or None if not linearly.

        Found by adding noise to the projection's output in one layer of each class.
        """
        kind = type(layer).__name__
        if kind not in self._scales:
            self._scales[kind] = from_first(residual_scale(walk, index, layer, layer.get_submodule(unit.output)))
        return self._scales[kind]
