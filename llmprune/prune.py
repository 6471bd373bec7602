"""Pass 2: walk dense and pruned side by side; cut, refit and write each layer, then let it go.

Two streams of hidden states run in step. The dense one says what each point of
the network should put out, the pruned one what the network being built does. A
removed layer is folded into the kept layer before it: that layer's target is the
dense stream after the gap.

Shapes: N windows, B batch, L sequence length, D hidden size, F neurons kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.anatomy.value import Anatomy, MlpUnit
from llmprune.cut import Cut, gap_after
from llmprune.model.loading import tensors_of
from llmprune.model.walk import Decoder, Tensors, Walk, inputs_of
from llmprune.progress import track
from llmprune.refit import Refit


@dataclass(frozen=True)
class LayerRecord:
    """Relative error of the hidden states after a kept layer (and its gap), before and after its refit."""

    layer: int
    error_cut: float
    error_refit: float | None


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
        self._scales: dict[type, float | None] = {}

    @torch.no_grad()
    def run(self, windows_NL: Tensor, batch_size: int) -> tuple[list[LayerRecord], Walk]:
        """Prune every kept layer; returns what was repaired, and the pruned stream after the last layer."""
        target = Walk(self.dense, windows_NL, batch_size)
        stream = Walk(self.pruned, windows_NL, batch_size)
        for index in range(self.cut.layers[0]):
            self._pass_dense(target, index)
        records = []
        for new in track(range(len(self.cut.layers)), "pass 2: cut and refit"):
            records.append(self._prune_layer(new, target, stream))
        return records, stream

    def _prune_layer(self, new: int, target: Walk, stream: Walk) -> LayerRecord:
        old = self.cut.layers[new]
        gap = gap_after(self.cut.layers, new, self.cut.num_layers)
        untouched = not gap and not self._is_narrowed(old) and _equal(stream.streams, target.streams)
        wanted = self._pass_dense(target, old)
        for index in gap:
            self._pass_dense(target, index)
        with self.pruned.layer(new) as layer:
            if untouched:
                stream.streams = list(target.streams)
                record = LayerRecord(old, 0.0, None)
            else:
                record = self._repair(new, layer, target, stream, wanted)
            self.write(new, tensors_of(layer))
        return record

    def _is_narrowed(self, layer: int) -> bool:
        return bool(self.cut.neurons) and bool(self.anatomy.units[layer])

    def _pass_dense(self, target: Walk, index: int) -> list[Tensor]:
        """Advance the dense stream; returns the outputs of the layer's projection where the refit needs them."""
        outputs: list[Tensor] = []
        unit = self._refit_unit(index)
        with self.dense.layer(index) as layer:
            if unit is not None and index in self.cut.layers and self._scale(target, index, layer, unit) is None:
                with _outputs_of(layer.get_submodule(unit.output), outputs.append):
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
        equations, error = self.refit.open(), _RelativeError()
        seen: list[Tensor] = []
        written: list[Tensor] = []
        with inputs_of(output, seen.append), _outputs_of(output, written.append):
            for batch, _, output_BLD in stream.outputs(new, layer):
                missing_BLD = target.streams[batch].to(output_BLD.device) - output_BLD
                error.update(missing_BLD, target.streams[batch])
                if wanted:  # a norm follows the projection: match its own dense output instead
                    missing_BLD = wanted[batch].to(output_BLD.device) - written.pop()
                equations.update(seen.pop().flatten(0, -2), missing_BLD.flatten(0, -2))
                written.clear()
        delta_DF = equations.solve() / (self._scales[type(layer)] or 1.0)
        weight = output.get_parameter("weight")
        delta = delta_DF if unit.output_dim == 1 else delta_DF.T
        weight.data = (weight.float() + delta).to(weight.dtype)
        return LayerRecord(old, error.value(), self._advance(new, layer, target, stream))

    def _advance(self, new: int, layer: nn.Module, target: Walk, stream: Walk) -> float:
        error = _RelativeError()
        for batch, _, output_BLD in stream.outputs(new, layer):
            error.update(target.streams[batch].to(output_BLD.device) - output_BLD, target.streams[batch])
            stream.advance(batch, output_BLD)
        return error.value()

    def _scale(self, walk: Walk, index: int, layer: nn.Module, unit: MlpUnit) -> float | None:
        """How much of the projection's output reaches the hidden states: a factor, or None if not linearly.

        Found by adding noise to the projection's output in one layer of each class.
        """
        kind = type(layer)
        if kind not in self._scales:
            self._scales[kind] = _residual_scale(walk, index, layer, layer.get_submodule(unit.output))
        return self._scales[kind]


def _residual_scale(walk: Walk, index: int, layer: nn.Module, output: nn.Module) -> float | None:
    hidden_BLD = walk.streams[0].to(walk.decoder.device_of(index))
    call = walk.calls[0][index]
    before_BLD = call.run(layer, hidden_BLD).float()
    noise_BLD = torch.randn(before_BLD.shape, generator=torch.Generator().manual_seed(0)).to(before_BLD)
    noise_BLD *= before_BLD.norm() / noise_BLD.norm()
    handle = output.register_forward_hook(lambda _, __, value: value + noise_BLD.to(value).view(value.shape))
    try:
        change_BLD = call.run(layer, hidden_BLD).float() - before_BLD
    finally:
        handle.remove()
    scale = float((change_BLD * noise_BLD).sum() / noise_BLD.square().sum())
    off = float((change_BLD - scale * noise_BLD).norm() / noise_BLD.norm())
    if abs(scale) < 1e-3 or off > 0.05 * abs(scale):
        return None
    return 1.0 if abs(scale - 1) < 0.01 else scale


class _RelativeError:
    """Mean over tokens of ‖difference‖² / ‖target‖², as its root."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def update(self, difference_BLD: Tensor, target_BLD: Tensor) -> None:
        target_BL = target_BLD.to(difference_BLD.device).float().square().sum(-1).clamp_min(1e-30)
        ratio_BL = difference_BLD.float().square().sum(-1) / target_BL
        self.total += float(ratio_BL.double().sum())
        self.tokens += ratio_BL.numel()

    def value(self) -> float:
        return math.sqrt(self.total / max(self.tokens, 1))


def _equal(mine: list[Tensor], others: list[Tensor]) -> bool:
    return all(a is b or torch.equal(a, b.to(a.device)) for a, b in zip(mine, others, strict=True))


@contextmanager
def _outputs_of(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: see(output))
    try:
        yield
    finally:
        handle.remove()
