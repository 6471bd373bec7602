"""Stand-ins: what the layer before one that is left out can take over, while trials walk.

While the model passes through each layer, the output projection of the layer before is solved to put out what this
layer would have added; where the layer is left out, the solution stands in for it.

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.types import Anatomy, MlpUnit
from llmprune.common.distributed import from_first, sum_over_processes
from llmprune.common.linalg.cross_validated_ridge import NormalEquations
from llmprune.cut.apply import add_to_output
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStates, HiddenStateStore
from llmprune.layerwise.residual_scale import residual_scale


class _Passed(NamedTuple):
    """A layer that both walks went through: inputs of its projection, and how that reaches the hidden states."""

    layer: int
    solved: HiddenStates  # [B, L, F], of the windows that are solved on
    judged: HiddenStates
    scale: float


class Standins:
    """The same model on windows of its own, on which the stand-ins are solved."""

    def __init__(
        self,
        decoder: Decoder,
        anatomy: Anatomy,
        *,
        windows_NL: Tensor,
        batch_size: int,
        store: HiddenStateStore,
        ridge: float,
    ) -> None:
        self.walk, self.anatomy, self.ridge = (
            LayerwiseForward(decoder, windows_NL, batch_size=batch_size, store=store),
            anatomy,
            ridge,
        )
        self.beginning = self.walk.copy()
        self.accepted: dict[int, Tensor] = {}  # Δ [D, F] of the layers before those that are gone
        self.found: dict[int, tuple[int, Tensor]] = {}  # of a layer left out: the layer before it, and its Δ

    def start(self) -> None:
        """Begin a round, before the first layer."""
        self.walk.streams = self.beginning
        self.walk.streams = self.walk.copy()
        self.found.clear()
        self._before: _Passed | None = None

    def repair(self, index: int, layer: nn.Module) -> None:
        """Give a layer the repairs that earlier rounds accepted."""
        unit = self._unit(index)
        if unit is not None and index in self.accepted:
            add_to_output(layer, unit, delta_DF=self.accepted[index])

    def follow(self, index: int, layer: nn.Module, *, judged: LayerwiseForward, without: HiddenStates | None) -> None:
        """Pass both walks through a layer; ``without`` it, the judged stream gets what stands in for it."""
        unit = self._unit(index)
        scale = None
        if unit:  # whether something is solved together goes by it
            scale = from_first(residual_scale(self.walk, index, layer=layer, output=layer.get_submodule(unit.output)))
        output = layer.get_submodule(unit.output) if unit and scale else None
        solved, seen = (
            _pass(self.walk, index, layer=layer, output=output, added=True),
            _pass(judged, index, layer=layer, output=output),
        )
        if without is not None and self._before is not None:
            delta_DF = self._solve(self._before, solved.added)
            for batch, input_BLF in enumerate(self._before.judged):
                input_BLF = input_BLF.to(delta_DF.device).float()
                added_BLD = (self._before.scale * (input_BLF @ delta_DF.T)).to(without[batch].dtype)
                without[batch] = without[batch] + added_BLD.to(without[batch].device)
            self.found[index] = self._before.layer, delta_DF
        self._before = _Passed(index, solved.inputs, seen.inputs, scale) if output and scale else None

    def accept(self, index: int) -> None:
        """Keep the repair for a layer that goes."""
        if index in self.found:
            before, delta_DF = self.found[index]
            self.accepted[before] = self.accepted.get(before, torch.zeros_like(delta_DF)) + delta_DF

    def _unit(self, index: int) -> MlpUnit | None:
        return next((unit for unit in self.anatomy.units[index] if unit.refit), None)

    def _solve(self, before: _Passed, lost: HiddenStates) -> Tensor:
        equations = NormalEquations(self.ridge, 1)
        device = self.walk.decoder.device_of(before.layer)
        for input_BLF, lost_BLD in zip(before.solved, lost, strict=True):
            input_TF, lost_TD = (value.to(device).flatten(0, -2) for value in (input_BLF, lost_BLD))
            equations.update(input_TF, None, inherited_TD=lost_TD / before.scale)
        sum_over_processes(equations.sums())
        where = f"layer {before.layer} in a trial without the next"
        delta_DF = equations.solve(where, setting="depth.criterion.ridge").delta_DF
        assert delta_DF is not None, "from one fold nothing is held out"
        return delta_DF


class _Seen(NamedTuple):
    added: HiddenStates  # what the layer added to the hidden states, where that is asked for
    inputs: HiddenStates  # of the output projection


def _pass(
    walk: LayerwiseForward, index: int, *, layer: nn.Module, output: nn.Module | None, added: bool = False
) -> _Seen:
    """Advance a walk by one layer, and keep the inputs of its output projection, and what it ``added``."""
    kept = {"added": HiddenStates(), "inputs": HiddenStates()}

    def keep(name: str, value: Tensor) -> None:
        batch = len(kept[name])
        value_BLX = value.reshape(*walk.streams[batch].shape[:2], -1)
        if not batch:
            kept[name] = walk.allocate(value_BLX)
        kept[name].append(value_BLX)

    with inputs_of(output or nn.Identity(), partial(keep, "inputs")):
        for batch, hidden_BLD, output_BLD in walk.outputs(index, layer):
            if added:
                keep("added", output_BLD - hidden_BLD)
            walk.advance(batch, output_BLD)
    return _Seen(**kept)
