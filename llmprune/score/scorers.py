"""Scorers of the parts of one layer: MLP neurons, key-value groups of attention heads, experts.

A scorer hooks into the layer during its forward pass, and ends with the scores of its part.

Shapes: T tokens, D hidden size, F neurons of a unit, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.anatomy.expert_hooks import activations_of_experts, outputs_of_experts
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.selection import neuron_rows, outputs_first
from llmprune.anatomy.types import Anatomy, AttentionUnit, ExpertBlock, MlpUnit, Unit, unit_key
from llmprune.criteria.accumulators.base import ExpertAccumulator, UnitAccumulator
from llmprune.criteria.base import ExpertCriterion, WidthCriterion
from llmprune.score.inputs import ScoringCriteria
from llmprune.score.scores import Scores


class Scorer(ABC):
    """Scores one part of a layer; ``key`` names the part in the scores."""

    key: str

    @abstractmethod
    def watch(self, hooks: ExitStack) -> None:
        """Read the part's activations until the hooks are removed."""

    @abstractmethod
    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves, which several processes add up in place before ``write``."""

    @abstractmethod
    def write(self, scores: Scores) -> None:
        """Write the part's scores from the sums of all processes."""


def scorers_of(index: int, layer: nn.Module, *, anatomy: Anatomy, criteria: ScoringCriteria) -> list[Scorer]:
    """Return the scorers of the parts of a layer that the criteria score."""
    scorers: list[Scorer] = []
    for unit in anatomy.units[index]:
        if criteria.width and _can_score(criteria.width, unit):
            kind = NeuronScorer if unit.experts is None else RoutedNeuronScorer
            scorers.append(kind(unit_key(index, unit.path), unit, layer=layer, criterion=criteria.width))
    attention = anatomy.attention[index]
    if criteria.heads and attention:
        key = unit_key(index, attention.path)
        scorers.append(KeyValueGroupScorer(key, attention, layer=layer, criterion=criteria.heads))
    block = anatomy.blocks[index]
    if criteria.experts and block and anatomy.experts:
        key, count = unit_key(index, block.path), anatomy.experts.count
        scorers.append(ExpertScorer(key, block, count=count, layer=layer, criterion=criteria.experts))
    return scorers


def _can_score(criterion: WidthCriterion, unit: MlpUnit) -> bool:
    return unit.refit or criterion.routed_refusal is None


class NeuronScorer(Scorer):
    """Scores the neurons of one MLP that every token passes through."""

    def __init__(self, key: str, unit: Unit, *, layer: nn.Module, criterion: WidthCriterion) -> None:
        output = unit.tensors[-1]
        self.key, self.output = key, layer.get_submodule(unit.output)
        weight_DF = outputs_first(layer.get_parameter(output.name), output)
        self.accumulator: UnitAccumulator = criterion.make_accumulator(weight_DF, self._input_rows(unit, layer))

    def _input_rows(self, unit: Unit, layer: nn.Module) -> list[Tensor]:
        """Return the weights of the neurons before the output projection, one row a neuron [F, …]."""
        return [neuron_rows(tensor_of(layer, prunable.name), prunable) for prunable in unit.tensors[:-1]]

    def watch(self, hooks: ExitStack) -> None:
        """Read the inputs and outputs of the output projection."""
        hooks.callback(self.output.register_forward_hook(self._see).remove)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: PLR0917 - torch calls it
        bias = getattr(module, "bias", None)
        self.accumulator.update_with(args[0], output if bias is None else output - bias)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the criterion."""
        return self.accumulator.reducible_state()

    def write(self, scores: Scores) -> None:
        """Write the scores of the neurons."""
        scores.neurons[self.key] = self.accumulator.scores().float().cpu()


class KeyValueGroupScorer(NeuronScorer):
    """Scores key-value groups of attention heads by their inputs of the output projection together.

    Of the weights only those of the output projection are read.
    """

    def __init__(self, key: str, unit: AttentionUnit, *, layer: nn.Module, criterion: WidthCriterion) -> None:
        super().__init__(key, unit, layer=layer, criterion=criterion)
        self.inputs = sum(unit.tensors[-1].parts)  # of each group, next to each other

    def _input_rows(self, unit: Unit, layer: nn.Module) -> list[Tensor]:
        return []

    def write(self, scores: Scores) -> None:
        """Write the scores of the groups."""
        scores.heads[self.key] = self.accumulator.group_scores(self.inputs).float().cpu()


class RoutedNeuronScorer(Scorer):
    """Scores the neurons of routed experts: each expert as a unit of its own, on the tokens routed to it.

    Where all neurons of an expert score 0, as without tokens, their scores are the norms of their output weights.
    """

    def __init__(self, key: str, unit: MlpUnit, *, layer: nn.Module, criterion: WidthCriterion) -> None:
        self.key, self._holder = key, layer.get_submodule(unit.path)
        *inputs, output = unit.tensors
        self.weight = layer.get_parameter(output.name)
        self.weight_EDF = self.weight if output.dim == 2 else self.weight.transpose(1, 2)
        stacked = [(tensor_of(layer, prunable.name), replace(prunable, dim=prunable.dim - 1)) for prunable in inputs]
        self.accumulators: list[UnitAccumulator] = [
            criterion.make_accumulator(
                weight_DF, [neuron_rows(tensor[expert], prunable) for tensor, prunable in stacked]
            )
            for expert, weight_DF in enumerate(self.weight_EDF)
        ]
        self.routed_E = torch.zeros(len(self.accumulators))

    def watch(self, hooks: ExitStack) -> None:
        """Read the activations of each expert's neurons."""
        hooks.enter_context(activations_of_experts(self._holder, self.weight, see=self._update))

    def _update(self, expert: int, activation_TF: Tensor) -> None:
        self.accumulators[expert].update(activation_TF)
        self.routed_E[expert] += len(activation_TF)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the criterion for every expert, and the tokens routed to each."""
        return [*(part for one in self.accumulators for part in one.reducible_state()), self.routed_E]

    def write(self, scores: Scores) -> None:
        """Write the scores of the neurons, and the number of tokens routed to each expert."""
        scored_EF = torch.stack([accumulator.scores().float() for accumulator in self.accumulators]).cpu()
        for expert, known in enumerate(scored_EF.any(1).tolist()):
            if not known:
                scored_EF[expert] = self.weight_EDF[expert].float().square().sum(0)
        scores.neurons[self.key] = scored_EF
        scores.routed[self.key] = self.routed_E


class ExpertScorer(Scorer):
    """Scores the experts of one layer."""

    def __init__(
        self, key: str, block: ExpertBlock, *, count: int, layer: nn.Module, criterion: ExpertCriterion
    ) -> None:
        self.key, self.count, self._module = key, count, layer.get_submodule(block.path)
        device = next(self._module.parameters()).device
        self.accumulator: ExpertAccumulator = criterion.make_accumulator(count, device)

    def watch(self, hooks: ExitStack) -> None:
        """Read what each expert adds to the hidden states."""
        hooks.callback(self._module.register_forward_pre_hook(self._see, with_kwargs=True).remove)

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:  # noqa: PLR0917 - torch calls it
        for one in outputs_of_experts(module, args, kwargs=kwargs, count=self.count):
            self.accumulator.update(one.expert, one.output_TD)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the criterion."""
        return self.accumulator.reducible_state()

    def write(self, scores: Scores) -> None:
        """Write the scores of the experts."""
        scores.experts[self.key] = self.accumulator.scores().float().cpu()
