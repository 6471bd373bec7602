"""What pass 1 scores in one layer: neurons, key-value groups of attention heads, experts.

Each part watches the layer while the walk goes through it, and ends with its scores.

Shapes: T tokens, D hidden size, F neurons of a unit, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.anatomy.expert_hooks import activations_of_experts, outputs_of_experts
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.selection import neuron_rows, outputs_first
from llmprune.anatomy.types import Anatomy, AttentionUnit, ExpertBlock, MlpUnit, Unit, unit_key
from llmprune.common.distributed import sum_over_processes
from llmprune.criteria.base import Accumulator, ExpertAccumulator, ExpertCriterion, UnitAccumulator, WidthCriterion
from llmprune.score.scores import Scores


def projections(
    layer: nn.Module, anatomy: Anatomy, *, index: int, width: WidthCriterion | None, heads: WidthCriterion | None
) -> list[Neurons | StackedNeurons]:
    """The layer's neurons and key-value groups, as far as they are scored."""
    parts: list[Neurons | StackedNeurons] = []
    for unit in anatomy.units[index] if width else ():
        assert width is not None
        if _can_score(width, unit):
            kind = Neurons if unit.experts is None else StackedNeurons
            parts.append(kind(unit_key(index, unit.path), unit, layer=layer, width=width))
    attention = anatomy.attention[index]
    if heads and attention:
        parts.append(Groups(unit_key(index, attention.path), attention, layer=layer, criterion=heads))
    return parts


def _can_score(width: WidthCriterion, unit: MlpUnit) -> bool:
    return unit.refit or width.routed_refusal is None


class Neurons:
    """Neurons of one projection."""

    def __init__(self, key: str, unit: MlpUnit, *, layer: nn.Module, width: WidthCriterion) -> None:
        *inputs, _ = unit.tensors
        rows = [neuron_rows(tensor_of(layer, cut.name), cut) for cut in inputs]
        self._open(key, unit, layer=layer, width=width, rows=rows)

    def _open(self, key: str, unit: Unit, *, layer: nn.Module, width: WidthCriterion, rows: list[Tensor]) -> None:
        output = unit.tensors[-1]
        weight = layer.get_parameter(output.name)
        self.key, self.output = key, layer.get_submodule(unit.output)
        self.sums: UnitAccumulator = width.open(outputs_first(weight, output), rows)

    def watch(self, hooks: ExitStack) -> None:
        """Take in the neurons' activations."""
        hooks.callback(self.output.register_forward_hook(self._see).remove)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: PLR0917 - torch calls it
        bias = getattr(module, "bias", None)
        self.sums.update_with(args[0], output if bias is None else output - bias)

    def write(self, scores: Scores) -> None:
        """Put the neurons' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores.neurons[self.key] = self.sums.scores().float().cpu()


class Groups(Neurons):
    """Key-value groups of attention heads: of each, what its inputs of the output projection are worth together.

    Of their weights only those of the output projection count.
    """

    def __init__(self, key: str, unit: AttentionUnit, *, layer: nn.Module, criterion: WidthCriterion) -> None:
        self._open(key, unit, layer=layer, width=criterion, rows=[])
        self.inputs = sum(unit.tensors[-1].parts)  # of each group, side by side

    def write(self, scores: Scores) -> None:
        """Put the groups' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores.heads[self.key] = self.sums.group_scores(self.inputs).float().cpu()


class StackedNeurons:
    """Neurons of many experts: each expert is scored as if it were a unit of its own, on the tokens it gets.

    Where all of an expert's neurons score 0, as without tokens, they are scored by the norm of what they write.
    """

    def __init__(self, key: str, unit: MlpUnit, *, layer: nn.Module, width: WidthCriterion) -> None:
        self.key, self._holder = key, layer.get_submodule(unit.path)
        *inputs, output = unit.tensors
        self.weight = layer.get_parameter(output.name)
        self.weight_EDF = self.weight if output.dim == 2 else self.weight.transpose(1, 2)
        stacked = [(tensor_of(layer, cut.name), replace(cut, dim=cut.dim - 1)) for cut in inputs]
        self.each: list[UnitAccumulator] = [
            width.open(weight_DF, [neuron_rows(tensor[expert], cut) for tensor, cut in stacked])
            for expert, weight_DF in enumerate(self.weight_EDF)
        ]
        self.routed_E = torch.zeros(len(self.each))

    def watch(self, hooks: ExitStack) -> None:
        """Take in the neurons' activations."""
        hooks.enter_context(activations_of_experts(self._holder, self.weight, see=self._update))

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
        scores.routed[self.key] = self.routed_E


class ExpertsOfLayer:
    """The experts of one layer."""

    def __init__(
        self, key: str, block: ExpertBlock, *, count: int, layer: nn.Module, criterion: ExpertCriterion
    ) -> None:
        self.key, self.count, self._module = key, count, layer.get_submodule(block.path)
        self.sums: ExpertAccumulator = criterion.open(count, next(self._module.parameters()).device)

    def watch(self, hooks: ExitStack) -> None:
        """Take in what the experts add."""
        hooks.callback(self._module.register_forward_pre_hook(self._see, with_kwargs=True).remove)

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:  # noqa: PLR0917 - torch calls it
        for part in outputs_of_experts(module, args, kwargs=kwargs, count=self.count):
            self.sums.update(part.expert, part.output_TD)

    def write(self, scores: Scores) -> None:
        """Put the experts' scores with the others."""
        sum_over_processes(self.sums.sums())
        scores.experts[self.key] = self.sums.scores().float().cpu()


def _sum_all_over_processes(accumulators: Sequence[Accumulator]) -> None:
    """Add up the sums of many accumulators of one kind, each kind of sum in one exchange."""
    for own in zip(*(accumulator.sums() for accumulator in accumulators), strict=True):
        stacked = torch.stack(own)
        sum_over_processes([stacked])
        for part, total in zip(own, stacked, strict=True):
            part.copy_(total)
