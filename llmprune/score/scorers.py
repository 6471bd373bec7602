"""Scorers of the parts of one layer: MLP neurons, key-value groups of attention heads, experts.

A scorer hooks into the layer during its forward pass, and ends with the scores of its part.

Shapes: T tokens, D hidden size, F neurons of a unit, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.anatomy.expert_hooks import activations_by_group, activations_of_experts, outputs_of_experts
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.selection import neuron_rows, outputs_first
from llmprune.anatomy.types import Anatomy, AttentionUnit, MlpUnit, Unit, unit_key
from llmprune.criteria.accumulators.base import ExpertAccumulator, UnitAccumulator
from llmprune.criteria.base import ExpertCriterion, WidthCriterion
from llmprune.score.expert_distances import ExpertDistanceScorer
from llmprune.score.inputs import ScoringCriteria
from llmprune.score.scorer import Scorer
from llmprune.score.scores import Scores
from llmprune.score.source_parts import SourceParts


def scorers_of(
    index: int, layer: nn.Module, *, anatomy: Anatomy, criteria: ScoringCriteria, parts: SourceParts
) -> list[Scorer]:
    """Return the scorers of the parts of a layer that the criteria score."""
    scorers: list[Scorer] = []
    for unit in anatomy.units[index]:
        if criteria.width and _can_score(criteria.width, unit):
            kind = NeuronScorer if unit.experts is None else RoutedNeuronScorer
            scorers.append(kind(unit_key(index, unit.path), unit, layer=layer, criterion=criteria.width, parts=parts))
    attention = anatomy.attention[index]
    if criteria.heads and attention:
        key = unit_key(index, attention.path)
        scorers.append(KeyValueGroupScorer(key, attention, layer=layer, criterion=criteria.heads, parts=parts))
    block = anatomy.blocks[index]
    if criteria.experts and block and anatomy.experts:
        key, count = unit_key(index, block.path), anatomy.experts.count
        module = layer.get_submodule(block.path)
        scorers.append(ExpertScorer(key, module, count=count, criterion=criteria.experts, parts=parts))
        if criteria.merges_experts:
            scorers.append(ExpertDistanceScorer(key, module, count=count))
    return scorers


def sums_of(scorers: Sequence[Scorer]) -> list[Tensor]:
    """Return the running sums of scorers, which several processes add up together."""
    return [tensor for scorer in scorers for tensor in scorer.reducible_state()]


def _can_score(criterion: WidthCriterion, unit: MlpUnit) -> bool:
    return unit.refit or criterion.routed_refusal is None


class NeuronScorer(Scorer):
    """Scores the neurons of one MLP that every token passes through."""

    def __init__(
        self, key: str, unit: Unit, *, layer: nn.Module, criterion: WidthCriterion, parts: SourceParts
    ) -> None:
        output = unit.tensors[-1]
        self.key, self.output, self.parts = key, layer.get_submodule(unit.output), parts
        self.is_relative = criterion.requires == "relative_activation_times_gradient"
        weight_DF, rows = outputs_first(layer.get_parameter(output.name), output), self._input_rows(unit, layer)
        self.accumulators: list[UnitAccumulator] = [
            criterion.make_accumulator(weight_DF, rows) for _ in range(parts.count)
        ]

    def _input_rows(self, unit: Unit, layer: nn.Module) -> list[Tensor]:
        """Return the weights of the neurons before the output projection, one row a neuron [F, …]."""
        return [neuron_rows(tensor_of(layer, prunable.name), prunable) for prunable in unit.tensors[:-1]]

    def watch(self, hooks: ExitStack) -> None:
        """Read the inputs and outputs of the output projection."""
        hooks.callback(self.output.register_forward_hook(self._see).remove)

    def _see(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: PLR0917 - torch calls it
        bias = getattr(module, "bias", None)
        written = output if bias is None else output - bias
        for source, (values, own) in self.parts.of_running(args[0], written):
            self.accumulators[source].update_with(values, own)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the criterion by each source."""
        return [tensor for accumulator in self.accumulators for tensor in accumulator.reducible_state()]

    def write(self, scores: Sequence[Scores]) -> None:
        """Write the scores of the neurons."""
        for one, accumulator in zip(scores, self.parts.merged(self.accumulators), strict=True):
            one.neurons[self.key] = accumulator.scores().float().cpu()


class KeyValueGroupScorer(NeuronScorer):
    """Scores key-value groups of attention heads by their inputs of the output projection together.

    Of the weights only those of the output projection are read.
    """

    def __init__(
        self, key: str, unit: AttentionUnit, *, layer: nn.Module, criterion: WidthCriterion, parts: SourceParts
    ) -> None:
        super().__init__(key, unit, layer=layer, criterion=criterion, parts=parts)
        self.inputs = sum(unit.tensors[-1].parts)  # of each group, next to each other

    def _input_rows(self, unit: Unit, layer: nn.Module) -> list[Tensor]:
        return []

    def write(self, scores: Sequence[Scores]) -> None:
        """Write the scores of the groups."""
        for one, accumulator in zip(scores, self.parts.merged(self.accumulators), strict=True):
            one.heads[self.key] = accumulator.group_scores(self.inputs).float().cpu()


class RoutedNeuronScorer(Scorer):
    """Scores the neurons of routed experts: each expert as a unit of its own, on the tokens routed to it.

    Where all neurons of an expert score 0, as without tokens, their scores are the norms of their output weights.
    """

    def __init__(
        self, key: str, unit: MlpUnit, *, layer: nn.Module, criterion: WidthCriterion, parts: SourceParts
    ) -> None:
        self.key, self._holder, self._parts = key, layer.get_submodule(unit.path), parts
        *inputs, output = unit.tensors
        self.weight = layer.get_parameter(output.name)
        self.weight_EDF = self.weight if output.dim == 2 else self.weight.transpose(1, 2)
        stacked = [(tensor_of(layer, prunable.name), replace(prunable, dim=prunable.dim - 1)) for prunable in inputs]
        self.accumulators: list[list[UnitAccumulator]] = [
            [
                criterion.make_accumulator(
                    weight_DF, [neuron_rows(tensor[expert], prunable) for tensor, prunable in stacked]
                )
                for expert, weight_DF in enumerate(self.weight_EDF)
            ]
            for _ in range(parts.count)
        ]
        self.routed_SE = torch.zeros(parts.count, len(self.weight_EDF))

    def watch(self, hooks: ExitStack) -> None:
        """Read the activations of each expert's neurons."""
        if self._parts.count == 1:
            see = partial(self._update, 0)
            observed = activations_of_experts(self._holder, self.weight, see=see)
        else:
            tokens = partial(self._parts.tokens_of_running, self.weight.device)
            observed = activations_by_group(self._holder, self.weight, see=self._update, tokens=tokens)
        hooks.enter_context(observed)

    def _update(self, source: int, expert: int, activation_TF: Tensor) -> None:  # noqa: PLR0917 - hooks call it
        self.accumulators[source][expert].update(activation_TF)
        self.routed_SE[source, expert] += len(activation_TF)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the criterion for every expert, and the tokens routed to each."""
        return [*(part for own in self.accumulators for one in own for part in one.reducible_state()), self.routed_SE]

    def write(self, scores: Sequence[Scores]) -> None:
        """Write the scores of the neurons, and the number of tokens routed to each expert."""
        of_experts = [self._parts.merged(own) for own in zip(*self.accumulators, strict=True)]
        routed_SE = self.routed_SE.sum(0, keepdim=True) if self._parts.is_pooled else self.routed_SE
        for one, accumulators, routed_E in zip(scores, zip(*of_experts, strict=True), routed_SE, strict=True):
            scored_EF = torch.stack([accumulator.scores().float() for accumulator in accumulators]).cpu()
            for expert, known in enumerate(scored_EF.any(1).tolist()):
                if not known:
                    scored_EF[expert] = self.weight_EDF[expert].float().square().sum(0)
            one.neurons[self.key] = scored_EF
            one.routed[self.key] = routed_E


class ExpertScorer(Scorer):
    """Scores the experts of one layer; ``module`` holds ``count`` of them."""

    def __init__(
        self, key: str, module: nn.Module, *, count: int, criterion: ExpertCriterion, parts: SourceParts
    ) -> None:
        self.key, self.count, self._module, self._parts = key, count, module, parts
        self._device = next(module.parameters()).device
        self.accumulators: list[ExpertAccumulator] = [
            criterion.make_accumulator(count, self._device) for _ in range(parts.count)
        ]

    def watch(self, hooks: ExitStack) -> None:
        """Read what each expert adds to the hidden states."""
        hooks.callback(self._module.register_forward_pre_hook(self._see, with_kwargs=True).remove)

    def _see(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:  # noqa: PLR0917 - torch calls it
        of_group = None
        if self._parts.count > 1:
            of_group = self._parts.source_of_running(self._device), self._parts.count
        for one in outputs_of_experts(module, args, kwargs=kwargs, count=self.count, of_group=of_group):
            self.accumulators[one.group].update(one.expert, one.output_TD)

    def reducible_state(self) -> list[Tensor]:
        """Return the sums of the criterion by each source."""
        return [tensor for accumulator in self.accumulators for tensor in accumulator.reducible_state()]

    def write(self, scores: Sequence[Scores]) -> None:
        """Write the scores of the experts."""
        for one, accumulator in zip(scores, self._parts.merged(self.accumulators), strict=True):
            one.experts[self.key] = accumulator.scores().float().cpu()
