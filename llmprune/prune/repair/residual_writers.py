"""Projections of a layer that write to the residual stream, found by adding noise to their outputs.

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
from llmprune.layerwise.staged_layer import Order, probe
from llmprune.prune.repair.following_norm import FollowingNorms
from llmprune.prune.repair.residual_scales import ResidualScales


@dataclass(frozen=True)
class ResidualWriter:
    """An output projection that writes to the residual stream.

    ``scale``: factor by which its output is added to the hidden states; None if a norm follows it. ``is_last``: it is
    the layer's last writer, so that it is refit towards the layer's output. ``later``: modules that write after it.
    """

    unit: Unit
    scale: float | None
    is_last: bool
    later: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the projection's module within the layer."""
        return self.unit.output

    def residual_after(self, hidden_BLD: Tensor, output: Tensor) -> Tensor:
        """Return the residual stream after this projection divided by ``scale``; its output alone without a scale.

        ``hidden_BLD``: the hidden states before the layer.
        """
        output_BLD = output.view_as(hidden_BLD)
        return output_BLD if self.scale is None else torch.add(output_BLD, hidden_BLD, alpha=1 / self.scale)


@dataclass(frozen=True)
class LayerTopology:
    """Order in which a layer calls its projections, and its residual writers in that order."""

    order: Order
    writers: tuple[ResidualWriter, ...] = ()

    def writer(self, name: str) -> ResidualWriter | None:
        """Return the writer of this name."""
        return next((one for one in self.writers if one.name == name), None)

    @property
    def last(self) -> ResidualWriter | None:
        """The last writer of the layer."""
        return next((one for one in self.writers if one.is_last), None)


class TopologyCache:
    """Topologies of layers, found once for each kind of layer."""

    def __init__(self, anatomy: Anatomy, scales: ResidualScales, *, norms: FollowingNorms) -> None:
        self.anatomy, self.scales, self.norms = anatomy, scales, norms
        self._orders: dict[Any, Order] = {}
        self._agreed: dict[Any, Order] = {}
        self._known: dict[Any, LayerTopology] = {}

    def order(self, forward: LayerwiseForward, index: int, *, layer: nn.Module) -> Order:
        """Return the order in which a layer with its weights calls its projections."""
        kind = kind_of(layer)
        if kind not in self._orders:
            self._orders[kind] = probe(forward, index, layer=layer, names=[one.name for one in projections_of(layer)])
        return self._orders[kind]

    def agreed_order(self, forward: LayerwiseForward, index: int, *, layer: nn.Module) -> Order:
        """Return the first process's ``order``: every process solves the same systems."""
        kind = kind_of(layer)
        if kind not in self._agreed:
            self._agreed[kind] = broadcast_from_first(self.order(forward, index, layer=layer))
        return self._agreed[kind]

    def topology(self, forward: LayerwiseForward, index: int, *, layer: nn.Module, old: int) -> LayerTopology:
        """Return the topology of a layer with its weights, whose index in the dense model is ``old``."""
        kind = kind_of(layer)
        if kind not in self._known:
            order = self.agreed_order(forward, index, layer=layer)
            writers = self._writers(forward, index, layer=layer, order=order, old=old)
            self._known[kind] = LayerTopology(order, writers)
        return self._known[kind]

    def _writers(
        self, forward: LayerwiseForward, index: int, *, layer: nn.Module, order: Order, old: int
    ) -> tuple[ResidualWriter, ...]:
        """Find projections whose noise reaches the layer's output linearly, and those that a norm follows.

        The last writer is measured with the layer as it is, earlier ones with later writers and experts zeroed.
        """
        *_, hidden = shape = forward.hidden_states[0].shape
        if len(shape) != 3:  # several streams of hidden states, which the layer mixes
            return ()
        sized = {one.name: one for one in projections_of(layer) if one.outputs == hidden}
        names = [name for group in order.groups for name in group if name in sized]
        block = self.anatomy.blocks[old]
        experts = [block.path] if block and block.path not in ("", *names) else []

        def scale_of(name: str, *zeroed: str) -> float | None:
            return self.scales.measure(forward, index, layer=layer, name=name, zeroed=zeroed)

        def has_norm(name: str, later: Sequence[str]) -> bool:
            return self.norms.of(forward, index, layer=layer, output=name, later=later) is not None

        last = next((name for name in reversed(names) if scale_of(name) is not None), None)
        units = (*self.anatomy.units[old], self.anatomy.attention[old])
        normed = {unit.output for unit in units if unit and unit.refit}
        writers = []
        for place, name in enumerate(names):
            later = () if name == last else (*names[place + 1 :], *experts)
            scale = scale_of(name, *later)
            if scale is not None or name in normed or (name in order.owners and has_norm(name, later)):
                writers.append(ResidualWriter(_unit(sized[name]), scale, name == last, later))
        return tuple(writers)


def _unit(projection: Projection) -> Unit:
    weight = PrunableDim(f"{projection.name}.weight", 0 if projection.transposed else 1)
    return Unit(projection.name, (weight,), projection.inputs)


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for layers that call their projections alike: classes, names and plain settings."""
    return tuple((name, type(module), _settings(module)) for name, module in layer.named_modules())


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    plain = (bool, int, float, str, type(None))
    settings = {
        key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")
    }
    return tuple((key, repr(value)) for key, value in sorted(settings.items()) if key != "layer_idx")
