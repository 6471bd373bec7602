"""Which projections of a layer write to the hidden states, found by what noise on their output does to the layer's.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.projections import Projection, projections_of
from llmprune.anatomy.types import Anatomy, PrunableDim, Unit
from llmprune.common.distributed import broadcast_from_first
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.residual_scale import residual_scale
from llmprune.layerwise.staged_layer import Order, muted, probe


@dataclass(frozen=True)
class ResidualWriter:
    """An output projection. ``scale``: how much of its output reaches the hidden states; None: a norm follows.

    ``last``: what it writes is solved for the whole layer's output.
    """

    unit: Unit
    scale: float | None
    last: bool

    @property
    def name(self) -> str:
        """Of the module in the layer."""
        return self.unit.output

    def behind(self, hidden_BLD: Tensor, output: Tensor) -> Tensor:
        """The layer's hidden states and its own output added up, in units of the latter; that alone without a scale."""
        output_BLD = output.view_as(hidden_BLD)
        return output_BLD if self.scale is None else torch.add(output_BLD, hidden_BLD, alpha=1 / self.scale)


@dataclass(frozen=True)
class LayerTopology:
    """How a layer calls its projections, and which of them write to the hidden states, in that order."""

    order: Order
    writers: tuple[ResidualWriter, ...]


class TopologyCache:
    """The outlines of layers, made once for each kind of layer. ``scales`` are kept with the run's snapshots."""

    def __init__(self, anatomy: Anatomy, scales: dict[str, float | None], *, writers: bool) -> None:
        self.anatomy, self.scales, self.writers = anatomy, scales, writers
        self._orders: dict[Any, Order] = {}
        self._known: dict[Any, LayerTopology] = {}

    def order(self, walk: LayerwiseForward, index: int, *, layer: nn.Module) -> Order:
        """How a layer with its weights calls its projections."""
        kind = _kind(layer)
        if kind not in self._orders:
            self._orders[kind] = probe(walk, index, layer=layer, names=[one.name for one in projections_of(layer)])
        return self._orders[kind]

    def of(self, walk: LayerwiseForward, index: int, *, layer: nn.Module, old: int) -> LayerTopology:
        """The outline of a layer with its weights, which was number ``old`` before the cut."""
        kind = _kind(layer)
        if kind not in self._known:
            order = broadcast_from_first(self.order(walk, index, layer=layer))  # what is solved goes by it
            writers = self._find(walk, index, layer=layer, order=order, old=old) if self.writers else ()
            self._known[kind] = LayerTopology(order, writers)
        return self._known[kind]

    def _find(
        self, walk: LayerwiseForward, index: int, *, layer: nn.Module, order: Order, old: int
    ) -> tuple[ResidualWriter, ...]:
        """Those whose noise reaches the layer's output linearly, in the last case with all else as it is, before it
        with later writers and experts silent; and those that the anatomy knows of and a norm follows.
        """
        *_, hidden = shape = walk.streams[0].shape
        if len(shape) != 3:  # several streams of hidden states side by side, which the layer mixes
            return ()
        sized = {one.name: one for one in projections_of(layer) if one.outputs == hidden}
        names = [name for group in order.groups for name in group if name in sized]
        block = self.anatomy.blocks[old]
        experts = [block.path] if block and block.path not in ("", *names) else []
        last = next(
            (
                name
                for name in reversed(names)
                if self._scale(walk, index, layer=layer, name=name, silent=()) is not None
            ),
            None,
        )
        units = (*self.anatomy.units[old], self.anatomy.attention[old])
        normed = {unit.output for unit in units if unit and unit.refit}
        writers = []
        for place, name in enumerate(names):
            scale = self._scale(
                walk, index, layer=layer, name=name, silent=() if name == last else (*names[place + 1 :], *experts)
            )
            if scale is not None or name in normed:
                writers.append(ResidualWriter(_unit(sized[name]), scale, name == last))
        return tuple(writers)

    def _scale(
        self, walk: LayerwiseForward, index: int, *, layer: nn.Module, name: str, silent: Sequence[str]
    ) -> float | None:
        key = f"{type(layer).__name__}.{name} without {','.join(silent)}"
        if key not in self.scales:
            with muted([layer.get_submodule(path) for path in silent]):
                self.scales[key] = broadcast_from_first(
                    residual_scale(walk, index, layer=layer, output=layer.get_submodule(name))
                )
        return self.scales[key]


def _unit(projection: Projection) -> Unit:
    weight = PrunableDim(f"{projection.name}.weight", 0 if projection.transposed else 1)
    return Unit(projection.name, (weight,), projection.inputs)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What tells layers apart that may call their projections otherwise: classes, names, and plain settings."""
    return tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    plain = (bool, int, float, str, type(None))
    said = {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}
    return tuple((key, repr(value)) for key, value in sorted(said.items()) if key != "layer_idx")
