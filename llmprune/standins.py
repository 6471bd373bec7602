"""Stand-ins: what the layer before one that is left out can take over, while trials walk.

While the model passes through each layer, the output projection of the layer before is solved to put out what this
layer would have added; where the layer is left out, the solution stands in for it.

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmprune.anatomy.value import Anatomy, MlpUnit
from llmprune.model.processes import sum_over_processes
from llmprune.model.streams import Streams, StreamStore
from llmprune.model.walk import Decoder, Walk, inputs_of
from llmprune.normal_equations import NormalEquations
from llmprune.residual import residual_scale
from llmprune.surgery import add_to_output


class _Passed(NamedTuple):
    """A layer that both walks went through: inputs of its projection, and how that reaches the hidden states."""

    layer: int
    solved: list[Tensor]  # [B, L, F] by batch, of the windows that are solved on
    judged: list[Tensor]
    scale: float


class Standins:
    """The same model on windows of its own, on which the stand-ins are solved."""

    def __init__(
        self, decoder: Decoder, anatomy: Anatomy, windows_NL: Tensor, batch_size: int, store: StreamStore, ridge: float
    ) -> None:
        self.walk, self.anatomy, self.ridge = Walk(decoder, windows_NL, batch_size, store), anatomy, ridge
        self.beginning = self.walk.copy()
        self.accepted: dict[int, Tensor] = {}  # Δ [D, F] of the layers before those that are gone
        self._found: dict[int, tuple[int, Tensor]] = {}  # of a layer left out: the layer before it, and its Δ

    def start(self) -> None:
        """Begin a round, before the first layer."""
        self.walk.streams = self.beginning
        self.walk.streams = self.walk.copy()
        self._found.clear()
        self._before: _Passed | None = None

    def repair(self, index: int, layer: nn.Module) -> None:
        """Give a layer the repairs that earlier rounds accepted."""
        unit = self._unit(index)
        if unit is not None and index in self.accepted:
            add_to_output(layer, unit, self.accepted[index])

    def follow(self, index: int, layer: nn.Module, judged: Walk, without: Streams | None) -> None:
        """Pass both walks through a layer; ``without`` it, the judged stream gets what stands in for it."""
        unit = self._unit(index)
        scale = residual_scale(self.walk, index, layer, layer.get_submodule(unit.output)) if unit else None
        seen = [_pass(walk, index, layer, unit if scale else None) for walk in (self.walk, judged)]
        lost, solved = seen[0].added, seen[0].inputs
        if without is not None and self._before is not None:
            delta_DF = self._solve(self._before, lost)
            for batch, input_BLF in enumerate(self._before.judged):
                added_BLD = (self._before.scale * (input_BLF.float() @ delta_DF.T)).to(without[batch].dtype)
                without[batch] = without[batch] + added_BLD.view_as(without[batch]).to(without[batch].device)
            self._found[index] = self._before.layer, delta_DF
        self._before = _Passed(index, solved, seen[1].inputs, scale) if scale else None

    def accept(self, index: int) -> None:
        """Keep the repair for a layer that goes."""
        if index in self._found:
            before, delta_DF = self._found[index]
            self.accepted[before] = self.accepted.get(before, torch.zeros_like(delta_DF)) + delta_DF

    def _unit(self, index: int) -> MlpUnit | None:
        return next((unit for unit in self.anatomy.units[index] if unit.refit), None)

    def _solve(self, before: _Passed, lost: list[Tensor]) -> Tensor:
        equations = NormalEquations(self.ridge, 1)
        for input_BLF, lost_BLD in zip(before.solved, lost, strict=True):
            device = input_BLF.device
            equations.update(input_BLF.flatten(0, -2), None, lost_BLD.to(device).flatten(0, -2) / before.scale)
        sum_over_processes(equations.sums())
        delta_DF = equations.solve().delta_DF
        assert delta_DF is not None, "a ridge that is given is solved with"
        return delta_DF


class _Seen(NamedTuple):
    added: list[Tensor]  # what the layer added to the hidden states, by batch
    inputs: list[Tensor]


def _pass(walk: Walk, index: int, layer: nn.Module, unit: MlpUnit | None) -> _Seen:
    """Advance a walk by one layer, and read what it added and the inputs of the unit's projection."""
    seen = _Seen([], [])
    output = layer.get_submodule(unit.output) if unit else nn.Identity()
    with inputs_of(output, seen.inputs.append):
        for batch, hidden_BLD, output_BLD in walk.outputs(index, layer):
            seen.added.append(output_BLD - hidden_BLD)
            walk.advance(batch, output_BLD)
    return seen
