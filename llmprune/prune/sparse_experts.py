"""Sparsification of routed experts: each expert's matrices on the inputs of the tokens that it gets.

Second moments of the inputs are summed over the tokens of one expert, each with the square of its routing weight, for
one expert at a time. An expert with fewer tokens than inputs is filled up with the mean over all tokens of the layer,
as if the missing tokens had been routed to it; one without tokens is calibrated on those alone.

Shapes: T tokens, O outputs of a matrix, I its inputs, E experts, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmprune.anatomy.stacked_projections import StackedProjection
from llmprune.anatomy.types import MlpUnit
from llmprune.common.distributed import sum_over_processes
from llmprune.common.errors import NumericalError
from llmprune.common.linalg.gram import add_gram, mirror
from llmprune.common.linalg.masked_least_squares import output_energy
from llmprune.layerwise.staged_layer import StagedLayer
from llmprune.prune.records import MatrixRecord
from llmprune.prune.routed_tokens import RoutedTokens

if TYPE_CHECKING:
    from llmprune.sparsity.method import InputMoments

_OTHER_TOKENS = 4  # tokens of the layer, per input, whose activations fill up the moments of an expert with few

Solve = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class SparseExperts:
    """Sparsification of the experts of ``unit``: of the ``stacks`` that the recipe selects.

    ``solve(target_OI, moments)`` returns sparse weights, and the squared error of each output if it computes that;
    ``moments``: of the inputs, that it needs.
    """

    unit: MlpUnit
    stacks: Sequence[StackedProjection]
    moments: InputMoments
    solve: Solve

    def prune(self, staged: StagedLayer) -> list[MatrixRecord]:
        """Prune the stacks of the layer in place, one expert after the other."""
        if not self.stacks:
            return []
        tokens = RoutedTokens(staged.forward, self.unit)
        if self.moments != "nothing":
            with tokens.recorded(staged.layer):
                for _ in staged.outputs():
                    pass
        for stack in self.stacks:  # the dense model may hold the same memory
            parameter = staged.layer.get_parameter(stack.name)
            parameter.data = parameter.data.clone()
        totals = {stack.name: _Total() for stack in self.stacks}
        inputs = _Inputs(staged, tokens, self.moments)
        for expert in range(self.stacks[0].experts):
            for stacks in self._by_input():
                self._prune_expert(staged.layer, stacks, expert=expert, inputs=inputs, totals=totals)
        return [total.record(name, stack=staged.layer.get_parameter(name)) for name, total in totals.items()]

    def _by_input(self) -> list[list[StackedProjection]]:
        """Return the stacks that read the hidden states, then those that read the activations."""
        groups = [[stack for stack in self.stacks if stack.is_output is last] for last in (False, True)]
        return [group for group in groups if group]

    def _prune_expert(
        self,
        layer: nn.Module,
        stacks: Sequence[StackedProjection],
        *,
        expert: int,
        inputs: _Inputs,
        totals: dict[str, _Total],
    ) -> None:
        """Prune matrices of one expert that have the same input, as one matrix."""
        views = [stack.matrix(layer.get_parameter(stack.name).data, expert) for stack in stacks]
        weight_OI = torch.cat([view.float() for view in views])
        moments = inputs.moments_of(expert, activations=stacks[0].is_output, width=weight_OI.shape[1])
        sparse_OI, error_O = self.solve(weight_OI, moments)
        if not torch.isfinite(sparse_OI).all():
            raise NumericalError(
                f"weights of expert {expert} of {stacks[0].name} are not finite after the sparsity method; check the "
                "checkpoint's weights, or leave the matrix out with sparsity.skip"
            )
        energy_O = None
        if moments is not None and moments.ndim == 2:
            error_O = output_energy(sparse_OI - weight_OI, moments) if error_O is None else error_O
            energy_O = output_energy(weight_OI, moments)
        start = 0
        for stack, view in zip(stacks, views, strict=True):
            rows = slice(start, start + stack.outputs)
            view.copy_(sparse_OI[rows])
            if error_O is not None and energy_O is not None:
                totals[stack.name].add(error_O[rows], energy_O[rows])
            start = rows.stop


@dataclass
class _Total:
    """Squared error and energy of the outputs of all experts of a stack, and the number of their matrices."""

    error: float = 0.0
    energy: float = 0.0
    known: bool = False

    def add(self, error_O: Tensor, energy_O: Tensor) -> None:
        """Add the outputs of one expert's matrix."""
        self.error += float(error_O.sum())
        self.energy += float(energy_O.sum())
        self.known = True

    def record(self, name: str, *, stack: Tensor) -> MatrixRecord:
        """Return the record of the stack."""
        error = (max(self.error, 0.0) / max(self.energy, 1e-30)) ** 0.5 if self.known else None
        return MatrixRecord(name, float((stack != 0).float().mean()), error)


@dataclass(frozen=True)
class _Inputs:
    """Inputs of the experts' matrices in one layer."""

    staged: StagedLayer
    tokens: RoutedTokens
    needed: InputMoments

    def moments_of(self, expert: int, *, activations: bool, width: int) -> Tensor | None:
        """Return the moments that are needed of one expert's inputs: XᵀX [I, I], its diagonal [I], or nothing."""
        if self.needed == "nothing":
            return None
        device = self.staged.forward.decoder.device_of(self.staged.index)
        own = _Sums(width, self.needed, device=device)
        for batch in self.tokens.batches:
            token_T, weight_T = self.tokens.routed_to(batch, expert, device=device)
            input_TI = self.tokens.hidden_states(batch, device)[token_T]
            own.add(self._inputs(expert, input_TI, activations=activations) * weight_T.unsqueeze(1))
            own.weight += weight_T.square().sum()
        own.reduce()
        lacking = width - int(own.count)
        if lacking > 0:
            others = _Sums(width, self.needed, device=device)
            for hidden_TD in self._some_tokens(width, device):
                others.add(self._inputs(expert, hidden_TD, activations=activations))
            others.reduce()
            weight = float(own.weight) / float(own.count) if own.count else 1.0
            own.moments += others.moments * (lacking * weight / max(float(others.count), 1.0))
        return own.finished()

    def _inputs(self, expert: int, hidden_TD: Tensor, *, activations: bool) -> Tensor:
        if not activations:
            return hidden_TD.float()
        return self.tokens.activations(self.staged.layer, expert, hidden_TD=hidden_TD).float()

    def _some_tokens(self, width: int, device: torch.device) -> Iterator[Tensor]:
        """Yield evenly spaced tokens of every batch, some times as many as inputs in all."""
        each = -(-_OTHER_TOKENS * width // len(self.tokens.batches))
        for batch in self.tokens.batches:
            hidden_TD = self.tokens.hidden_states(batch, device)
            yield hidden_TD[:: max(len(hidden_TD) // each, 1)]


class _Sums:
    """Second moments of inputs, summed over tokens in float32. ``weight``: sum of their squared routing weights."""

    def __init__(self, width: int, needed: InputMoments, *, device: torch.device) -> None:
        self.is_gram = needed == "gram"
        self.moments = torch.zeros((width, width) if self.is_gram else width, device=device)
        self.count, self.weight = torch.zeros(1), torch.zeros(1, device=device)

    def add(self, input_TI: Tensor) -> None:
        """Add the inputs of some tokens."""
        self.count += len(input_TI)
        if self.is_gram:
            add_gram(self.moments, input_TI)
        else:
            self.moments += input_TI.square().sum(0)

    def reduce(self) -> None:
        """Sum over processes."""
        sum_over_processes([self.moments, self.count, self.weight])

    def finished(self) -> Tensor:
        """Return the moments."""
        if self.is_gram:
            mirror(self.moments)
        return self.moments
