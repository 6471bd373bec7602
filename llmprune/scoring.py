"""Pass 1: walk the dense model once; every layer, neuron and expert gets its scores on the way.

Criteria by gradients score on the way back.

Shapes: N layers, B batch, L sequence length, T tokens, D hidden size, F neurons of a unit, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.anatomy.selection import neuron_rows
from llmprune.anatomy.units import tensor_of
from llmprune.anatomy.value import Anatomy, ExpertBlock, MlpUnit
from llmprune.anatomy.watching import activations_of_experts, outputs_of_experts
from llmprune.criteria.base import (
    Accumulator,
    ExpertAccumulator,
    ExpertCriterion,
    PassingCriterion,
    UnitAccumulator,
    WidthCriterion,
)
from llmprune.errors import CalibrationError, NumericalError
from llmprune.gradients import WayBack
from llmprune.model.processes import share_of, sum_over_processes
from llmprune.model.streams import Streams, StreamStore
from llmprune.model.walk import Decoder, Walk, inputs_of
from llmprune.progress import track
from llmprune.scores import Scores, unit_key


def score(
    decoder: Decoder,
    anatomy: Anatomy,
    windows_NL: Tensor,
    batch_size: int,
    depth: PassingCriterion | None,
    width: WidthCriterion | None,
    experts: ExpertCriterion | None = None,
    store: StreamStore = StreamStore(),  # noqa: B008  # frozen
    remove: int = 1,
) -> Scores:
    """Scores by whichever criteria are given, in one walk; over several processes, the same in each.

    ``remove``: how many layers are to go.
    """
    back = width if width is not None and width.takes == "effects" else None
    if back is not None:
        width = None
        _require_trail(back, store)
    walk = Walk(decoder, share_of(windows_NL), batch_size, store)
    runs = _Runs(depth, depth.horizon(remove), walk) if depth else None
    scores = Scores(None, {})
    for index in track(range(len(decoder)), "pass 1: scoring layers"):
        with decoder.layer(index) as layer, ExitStack() as hooks:
            parts = _open_parts(layer, anatomy, index, width, experts, hooks)
            if runs:
                runs.open(decoder.device_of(index))
            for batch, hidden_BLD, output_BLD in walk.outputs(index, layer):
                if runs:
                    runs.update(batch, hidden_BLD, output_BLD)
                walk.advance(batch, output_BLD)
            if store.trail is not None:
                store.trail.keep(index, walk.streams)
            if runs:
                runs.close()
            for part in parts:
                part.write(scores)
    if back is not None and store.trail is not None:
        _score_backwards(WayBack(walk, store.trail), decoder, anatomy, back, scores)
    layers_N = runs.scores(len(decoder)) if runs else None
    scores = Scores(layers_N, scores.neurons, scores.experts, scores.routed)
    _require_finite(scores)
    return scores


class _Runs:
    """Every run of ``span`` neighbouring layers, each scored when its last layer is visited."""

    def __init__(self, criterion: PassingCriterion, span: int, walk: Walk) -> None:
        self.criterion, self.span, self.walk = criterion, span, walk
        self.starts: deque[Streams] = deque(maxlen=span)  # before the layers of the run; of one layer, at hand
        self.found: list[Tensor] = []

    def open(self, device: torch.device) -> None:
        """Start with one layer."""
        if self.span > 1:
            self.starts.append(self.walk.copy())
        self.sums = self.criterion.open(device)

    def update(self, batch: int, hidden_BLD: Tensor, output_BLD: Tensor) -> None:
        """Take in a batch of the layer, the last one of a run."""
        if self.span == 1:
            self.sums.update(hidden_BLD, output_BLD)
        elif len(self.starts) == self.span:
            self.sums.update(self.starts[0][batch].to(output_BLD.device), output_BLD)

    def close(self) -> None:
        """End with the layer."""
        if self.span == 1 or len(self.starts) == self.span:
            sum_over_processes(self.sums.sums())
            self.found.append(self.sums.score().cpu())

    def scores(self, layers: int) -> Tensor:
        """For each layer the score of the best run that it is part of, float32 [N]."""
        runs_R = torch.stack(self.found)
        each = [runs_R[max(0, index - self.span + 1) : index + 1].min() for index in range(layers)]
        return torch.stack(each)


def _require_trail(width: WidthCriterion, store: StreamStore) -> None:
    if store.trail is None:
        raise CalibrationError(
            f"width.criterion {width.kind} goes back over the hidden states after every layer, and there is no room "
            "for them; free disk in the run folder, raise calibration.stream_disk, or choose another criterion"
        )


def _score_backwards(back: WayBack, decoder: Decoder, anatomy: Anatomy, width: WidthCriterion, scores: Scores) -> None:
    """Score the neurons that every token goes through by their effects on the loss."""
    for index in track(range(len(decoder) - 1, -1, -1), "pass 1: gradients"):
        units = [unit for unit in anatomy.units[index] if _can_score(width, unit)]
        with decoder.layer(index) as layer:
            parts = [_Unit(unit_key(index, unit.path), unit, layer, width) for unit in units]
            modules = [layer.get_submodule(unit.output) for unit in units]
            for effects in back.effects(index, layer, modules):
                for part, effect_BLF in zip(parts, effects, strict=True):
                    part.sums.update(effect_BLF)
            for part in parts:
                part.write(scores)


def _can_score(width: WidthCriterion, unit: MlpUnit) -> bool:
    return unit.refit or width.routed_refusal is None


class _Unit:
    """Neurons of one projection."""

    def __init__(self, key: str, unit: MlpUnit, layer: nn.Module, width: WidthCriterion) -> None:
        self.key, self._output = key, layer.get_submodule(unit.output)
        *inputs, output = unit.tensors
        weight = layer.get_parameter(output.name)
        rows = [neuron_rows(tensor_of(layer, cut.name), cut) for cut in inputs]
        self.sums: UnitAccumulator = width.open(weight if output.dim == 1 else weight.T, rows)

    def watch(self, hooks: ExitStack) -> None:
        """Take in the neurons' activations."""
        hooks.enter_context(inputs_of(self._output, self.sums.update))

    def write(self, scores: Scores) -> None:
        """Put the neurons' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores.neurons[self.key] = self.sums.scores().float().cpu()


class _StackedUnit:
    """Neurons of many experts: each expert is scored as if it were a unit of its own, on the tokens it gets.

    Where all of an expert's neurons score 0, as without tokens, they are scored by the norm of what they write.
    """

    def __init__(self, key: str, unit: MlpUnit, layer: nn.Module, width: WidthCriterion) -> None:
        self.key, self._holder = key, layer.get_submodule(unit.path)
        *inputs, output = unit.tensors
        self.weight = layer.get_parameter(output.name)
        self.weight_EDF = self.weight if output.dim == 2 else self.weight.transpose(1, 2)
        stacked = [(tensor_of(layer, cut.name), replace(cut, dim=cut.dim - 1)) for cut in inputs]
        self.each: list[UnitAccumulator] = [
            width.open(weight_DF, [neuron_rows(tensor[expert], cut) for tensor, cut in stacked])
            for expert, weight_DF in enumerate(self.weight_EDF)
        ]
        self.routed_E = torch.zeros(len(self.each), device=self.weight.device)

    def watch(self, hooks: ExitStack) -> None:
        """Take in the neurons' activations."""
        hooks.enter_context(activations_of_experts(self._holder, self.weight, self._update))

    def _update(self, expert: int, activation_TF: Tensor) -> None:
        self.each[expert].update(activation_TF)
        self.routed_E[expert] += len(activation_TF)

    def write(self, scores: Scores) -> None:
        """Put the neurons' scores with the others."""
        _sum_all_over_processes(self.each)
        sum_over_processes([self.routed_E])
        energy_EF = self.weight_EDF.float().square().sum(1)
        scored_EF = torch.stack([sums.scores().float() for sums in self.each])
        known_E1 = scored_EF.any(1, keepdim=True)
        scores.neurons[self.key] = torch.where(known_E1, scored_EF, energy_EF).cpu()
        scores.routed[self.key] = self.routed_E.cpu()


class _Experts:
    """The experts of one layer."""

    def __init__(
        self, key: str, block: ExpertBlock, count: int, layer: nn.Module, criterion: ExpertCriterion, hooks: ExitStack
    ) -> None:
        self.key = key
        module = layer.get_submodule(block.path)
        device = next(module.parameters()).device
        self.sums: ExpertAccumulator = criterion.open(count, device)

        def see(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            for expert, _, added_TD in outputs_of_experts(module, args, kwargs, count):
                self.sums.update(expert, added_TD)

        hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)

    def write(self, scores: Scores) -> None:
        """Put the experts' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores.experts[self.key] = self.sums.scores().float().cpu()


def _open_parts(
    layer: nn.Module,
    anatomy: Anatomy,
    index: int,
    width: WidthCriterion | None,
    experts: ExpertCriterion | None,
    hooks: ExitStack,
) -> list[_Unit | _StackedUnit | _Experts]:
    parts: list[_Unit | _StackedUnit | _Experts] = []
    if width:
        for unit in anatomy.units[index]:
            if _can_score(width, unit):
                kind = _Unit if unit.experts is None else _StackedUnit
                part = kind(unit_key(index, unit.path), unit, layer, width)
                part.watch(hooks)
                parts.append(part)
    block = anatomy.blocks[index]
    if experts and block and anatomy.experts:
        parts.append(_Experts(unit_key(index, block.path), block, anatomy.experts.count, layer, experts, hooks))
    return parts


def _sum_all_over_processes(accumulators: Sequence[Accumulator]) -> None:
    """Add up the sums of many accumulators of one kind, each kind of sum in one exchange."""
    for own in zip(*(accumulator.sums() for accumulator in accumulators), strict=True):
        stacked = torch.stack(own)
        sum_over_processes([stacked])
        for part, total in zip(own, stacked, strict=True):
            part.copy_(total)


def _require_finite(scores: Scores) -> None:
    bad = [key for kind in (scores.neurons, scores.experts) for key, values in kind.items() if not _is_finite(values)]
    if scores.layers is not None and not _is_finite(scores.layers):
        bad.append("layers")
    if bad:
        raise NumericalError(f"the scores of {', '.join(bad[:3])} are not finite; try model.dtype: float32")


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
