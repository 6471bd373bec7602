"""Pass 1: walk the dense model once; every layer, neuron, attention head and expert gets its scores on the way.

Shapes: N layers, B batch, L sequence length, T tokens, D hidden size, F neurons of a unit, G key-value groups of heads,
E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from llmprune.anatomy.value import Anatomy, AttentionUnit, ExpertBlock, MlpUnit, Unit
from llmprune.anatomy.watching import activations_of_experts, outputs_of_experts
from llmprune.criteria.base import (
    Accumulator,
    DepthCriterion,
    ExpertAccumulator,
    ExpertCriterion,
    UnitAccumulator,
    WidthCriterion,
)
from llmprune.errors import NumericalError
from llmprune.model.processes import share_of, sum_over_processes
from llmprune.model.streams import StreamStore
from llmprune.model.walk import Decoder, Walk, inputs_of
from llmprune.progress import track
from llmprune.scores import Scores, unit_key


def score(
    decoder: Decoder,
    anatomy: Anatomy,
    windows_NL: Tensor,
    batch_size: int,
    depth: DepthCriterion | None,
    width: WidthCriterion | None,
    experts: ExpertCriterion | None = None,
    store: StreamStore = StreamStore(),  # noqa: B008  # frozen
    heads: WidthCriterion | None = None,
) -> Scores:
    """Scores by whichever criteria are given, in one walk; over several processes, the same in each.

    ``width`` scores the MLPs' neurons, ``heads`` the attention's key-value groups.
    """
    walk = Walk(decoder, share_of(windows_NL), batch_size, store)
    layer_scores: list[Tensor] = []
    scores = Scores(None, {})
    for index in track(range(len(decoder)), "pass 1: scoring layers"):
        with decoder.layer(index) as layer, ExitStack() as hooks:
            parts = _open_parts(layer, anatomy, index, width, experts, hooks)
            attention = anatomy.attention[index]
            if heads and attention:
                parts.append(_Heads(unit_key(index, attention.path), attention, layer, heads, hooks))
            accumulator = depth.open(decoder.device_of(index)) if depth else None
            for batch, hidden_BLD, output_BLD in walk.outputs(index, layer):
                if accumulator:
                    accumulator.update(hidden_BLD, output_BLD)
                walk.advance(batch, output_BLD)
            if store.trail is not None:
                store.trail.keep(index, walk.streams)
            if accumulator:
                sum_over_processes(accumulator.sums())
                layer_scores.append(accumulator.score().cpu())
            for part in parts:
                part.write(scores)
    scores = replace(scores, layers=torch.stack(layer_scores) if layer_scores else None)
    _require_finite(scores)
    return scores


class _Unit:
    """Neurons of one projection."""

    def __init__(self, key: str, unit: Unit, layer: nn.Module, width: WidthCriterion, hooks: ExitStack) -> None:
        self.key = key
        output = unit.tensors[-1]
        weight = layer.get_parameter(output.name)
        self.sums: UnitAccumulator = width.open(weight if output.dim == 1 else weight.T)
        hooks.enter_context(inputs_of(layer.get_submodule(unit.output), self.sums.update))

    def write(self, scores: Scores) -> None:
        """Put the neurons' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores.neurons[self.key] = self.sums.scores().float().cpu()


class _Heads(_Unit):
    """Key-value groups of attention heads: of each, the sum of the scores of its inputs of the output projection."""

    def __init__(
        self, key: str, unit: AttentionUnit, layer: nn.Module, criterion: WidthCriterion, hooks: ExitStack
    ) -> None:
        super().__init__(key, unit, layer, criterion, hooks)
        self.inputs = sum(unit.tensors[-1].parts)  # of each group, side by side

    def write(self, scores: Scores) -> None:
        """Put the groups' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores_F = self.sums.scores().float()
        scores.heads[self.key] = scores_F.view(-1, self.inputs).sum(1).cpu()


class _StackedUnit:
    """Neurons of many experts: each expert is scored as if it were a unit of its own, on the tokens it gets.

    Where no token is routed to an expert, its neurons are scored by the norm of what they write.
    """

    def __init__(self, key: str, unit: MlpUnit, layer: nn.Module, width: WidthCriterion, hooks: ExitStack) -> None:
        self.key = key
        output = unit.tensors[-1]
        self.weight = layer.get_parameter(output.name)
        self.weight_EDF = self.weight if output.dim == 2 else self.weight.transpose(1, 2)
        self.each: list[UnitAccumulator] = [width.open(weight_DF) for weight_DF in self.weight_EDF]
        self.routed_E = torch.zeros(len(self.each), device=self.weight.device)
        holder = layer.get_submodule(unit.path)
        hooks.enter_context(activations_of_experts(holder, self.weight, self._update))

    def _update(self, expert: int, activation_TF: Tensor) -> None:
        self.each[expert].update(activation_TF)
        self.routed_E[expert] += len(activation_TF)

    def write(self, scores: Scores) -> None:
        """Put the neurons' scores with the others."""
        _sum_all_over_processes(self.each)
        sum_over_processes([self.routed_E])
        energy_EF = self.weight_EDF.float().square().sum(1)
        scored_EF = torch.stack([sums.scores().float() for sums in self.each])
        chosen_E1 = (self.routed_E > 0).unsqueeze(1)
        scores.neurons[self.key] = torch.where(chosen_E1, scored_EF, energy_EF).cpu()
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


Part: TypeAlias = _Unit | _StackedUnit | _Experts


def _open_parts(
    layer: nn.Module,
    anatomy: Anatomy,
    index: int,
    width: WidthCriterion | None,
    experts: ExpertCriterion | None,
    hooks: ExitStack,
) -> list[Part]:
    parts: list[Part] = []
    if width:
        for unit in anatomy.units[index]:
            kind = _Unit if unit.experts is None else _StackedUnit
            parts.append(kind(unit_key(index, unit.path), unit, layer, width, hooks))
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
    kinds = (scores.neurons, scores.experts, scores.heads)
    bad = [key for kind in kinds for key, values in kind.items() if not _is_finite(values)]
    if scores.layers is not None and not _is_finite(scores.layers):
        bad.append("layers")
    if bad:
        raise NumericalError(f"the scores of {', '.join(bad[:3])} are not finite; try model.dtype: float32")


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
