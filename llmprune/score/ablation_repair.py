"""Ablation with repair: before layer *l* is ablated, the output projection of layer *l − 1* is refit to absorb it.

While the model passes through a layer, the output projection of the layer before is solved for what this layer adds to
the hidden states. Where the layer is ablated, the solution is added in its place.

Shapes: B batch, L sequence length, D hidden size, F inputs of the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.types import Anatomy, MlpUnit
from llmprune.common.distributed import broadcast_from_first, sum_over_processes
from llmprune.common.linalg.cross_validated_ridge import NormalEquations
from llmprune.cut.apply import add_to_output
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.residual_scale import residual_scale
from llmprune.score.inputs import CalibrationBatches


class _RefitLayer(NamedTuple):
    """A layer that can be refit: inputs [B, L, F] of its output projection, and its scale in the stream."""

    number: int
    solved: HiddenStates  # on the windows that the refit is solved on
    judged: HiddenStates
    scale: float


class _Refit(NamedTuple):
    """Refit of a layer that absorbs the next one; ``delta_DF`` is added to its output projection."""

    number: int
    delta_DF: Tensor


class AblationRepair:
    """Refits of layers that absorb the one after them, solved on calibration windows of their own.

    ``found``: of the current round, by the layer that is ablated. ``measure``: the scale of a module's output in the
    hidden states, None where it does not reach them linearly. ``agree``: the first process's value of it, in all.
    """

    def __init__(
        self,
        decoder: Decoder,
        anatomy: Anatomy,
        *,
        calibration: CalibrationBatches,
        ridge: float,
        measure: Callable[..., float | None] = residual_scale,
        agree: Callable[[float | None], float | None] = broadcast_from_first,
    ) -> None:
        self.anatomy, self.ridge = anatomy, ridge
        self.found: dict[int, _Refit] = {}
        self._measure, self._agree = measure, agree
        self._start = calibration.forward(decoder)  # before the first layer; copies of it advance
        self._current = self._start  # replaced by a copy at the start of a round
        self._accepted: dict[int, Tensor] = {}  # Δ [D, F] of the layers before those that were removed
        self._before: _RefitLayer | None = None

    def start_round(self) -> None:
        """Go back before the first layer."""
        self._current = self._start.on(self._start.copy())
        self.found.clear()
        self._before = None

    def apply(self, index: int, layer: nn.Module) -> None:
        """Add the refits of earlier rounds to a layer's weights."""
        unit = self._unit(index)
        if unit is not None and index in self._accepted:
            add_to_output(layer, unit, delta_DF=self._accepted[index])

    def follow(self, index: int, layer: nn.Module, *, judged: LayerwiseForward, ablated: HiddenStates | None) -> None:
        """Advance both forward passes by a layer; add the refit of the layer before to the ``ablated`` hidden states.

        ``ablated``: hidden states of the judged windows without this layer; None where it is not ablated.
        """
        unit = self._unit(index)
        output, scale = None, None
        if unit:  # collective: every process takes this branch
            output = layer.get_submodule(unit.output)
            scale = self._agree(self._measure(self._current, index, layer=layer, output=output))
        refit_output = output if scale else None
        solved = _advance(self._current, index, layer=layer, output=refit_output, keep_added=True)
        seen = _advance(judged, index, layer=layer, output=refit_output)
        if ablated is not None and self._before is not None:
            delta_DF = self._solve(self._before, solved.added)
            _add_refit(ablated, self._before, delta_DF=delta_DF)
            self.found[index] = _Refit(self._before.number, delta_DF)
        self._before = _RefitLayer(index, solved.inputs, seen.inputs, scale) if scale else None

    def accept(self, index: int) -> None:
        """Keep the refit for a layer that is removed."""
        if index in self.found:
            before, delta_DF = self.found[index]
            self._accepted[before] = self._accepted.get(before, torch.zeros_like(delta_DF)) + delta_DF

    def _unit(self, index: int) -> MlpUnit | None:
        return next((unit for unit in self.anatomy.units[index] if unit.refit), None)

    def _solve(self, before: _RefitLayer, added: HiddenStates) -> Tensor:
        """Return Δ [D, F] for the layer before from what a layer ``added`` to the hidden states."""
        equations = NormalEquations(self.ridge, 1)
        device = self._start.decoder.device_of(before.number)
        for batch in range(len(added)):
            input_TF, added_TD = (kept.at(batch, device).flatten(0, -2) for kept in (before.solved, added))
            equations.update(input_TF, None, inherited_TD=added_TD / before.scale)
        sum_over_processes(equations.reducible_state())
        where = f"layer {before.number} in the ablation of the next"
        delta_DF = equations.solve(where, setting="depth.criterion.ridge").delta_DF
        assert delta_DF is not None, "one fold cannot be held out"
        return delta_DF


def _add_refit(hidden_states: HiddenStates, layer: _RefitLayer, *, delta_DF: Tensor) -> None:
    """Add the change of a layer's output to hidden states after it."""
    device = delta_DF.device
    for batch in range(len(hidden_states)):
        hidden_BLD = hidden_states.at(batch, device)
        added_BLD = layer.scale * (layer.judged.at(batch, device).float() @ delta_DF.T)
        hidden_states[batch] = hidden_BLD + added_BLD.to(hidden_BLD.dtype)


class _LayerPass(NamedTuple):
    added: HiddenStates  # output of the layer less its input; empty unless asked for
    inputs: HiddenStates  # of the output projection; empty without one


def _advance(
    forward: LayerwiseForward, index: int, *, layer: nn.Module, output: nn.Module | None, keep_added: bool = False
) -> _LayerPass:
    """Advance a forward pass by one layer; return the inputs of its output projection, and what the layer added."""
    kept = {"added": HiddenStates(), "inputs": HiddenStates()}

    def keep(name: str, value: Tensor) -> None:
        batch = len(kept[name])
        value_BLX = value.reshape(*forward.batches[batch].shape, -1)
        if not batch:
            kept[name] = forward.allocate(value_BLX)
        kept[name].append(value_BLX)

    with inputs_of(output or nn.Identity(), partial(keep, "inputs")):
        for batch, hidden_BLD, output_BLD in forward.outputs(index, layer):
            if keep_added:
                keep("added", output_BLD - hidden_BLD)
            forward.advance(batch, output_BLD)
    return _LayerPass(**kept)
