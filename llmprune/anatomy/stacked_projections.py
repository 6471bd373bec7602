"""Matrices of routed experts, which a layer stores as stacks: one three-dimensional tensor for all experts.

Shapes in names: E experts, O outputs, I inputs of one expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.types import MlpUnit


@dataclass(frozen=True)
class StackedProjection:
    """A stack of the matrices of ``experts`` experts.

    ``name``: of the tensor in the layer; ``outputs``, ``inputs``: of one matrix; ``transposed``: the stack is stored
    [E, I, O]. ``is_output``: its inputs are the activations of the experts' neurons.
    """

    name: str
    outputs: int
    inputs: int
    transposed: bool
    experts: int
    is_output: bool

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        """Return the matrix of one expert [O, I], a view of the stack."""
        return stack[expert].T if self.transposed else stack[expert]


def stacked_projections(layer: nn.Module, units: Iterable[MlpUnit]) -> tuple[StackedProjection, ...]:
    """Return the stacks of a layer, which may be on the meta device, in the order of their use."""
    found = []
    for unit in units:
        for prunable in unit.tensors if unit.experts is not None else ():
            tensor, is_output = tensor_of(layer, prunable.name), prunable is unit.tensors[-1]
            if tensor.ndim == 3:
                inputs_dim = prunable.dim if is_output else 3 - prunable.dim
                outputs, inputs = tensor.shape[3 - inputs_dim], tensor.shape[inputs_dim]
                found.append(StackedProjection(prunable.name, outputs, inputs, inputs_dim == 1, len(tensor), is_output))
    return tuple(found)
