"""The projections of a layer: its modules that multiply by one matrix, in either layout.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Projection:
    """One of them; ``name`` is the module's in the layer. ``transposed``: its weight is stored [I, O], as GPT-2's."""

    name: str
    outputs: int
    inputs: int
    transposed: bool


def projections_of(layer: nn.Module) -> tuple[Projection, ...]:
    """All of a layer, which may be without weights."""
    return tuple(
        Projection(name, outputs, module.weight.numel() // outputs, isinstance(module, Conv1D))
        for name, module in layer.named_modules()
        if (outputs := outputs_of_projection(module)) is not None
    )


def outputs_of_projection(module: nn.Module) -> int | None:
    """How many outputs a projection has; None of other modules."""
    if isinstance(module, nn.Linear):
        return int(module.weight.shape[0])
    return int(module.weight.shape[1]) if isinstance(module, Conv1D) else None


def weight_of(layer: nn.Module, projection: Projection) -> Tensor:
    """Its weight [O, I], in its own type: a view where it is stored otherwise."""
    weight = layer.get_submodule(projection.name).get_parameter("weight")
    return weight.T if projection.transposed else weight


def set_weight(layer: nn.Module, projection: Projection, *, weight_OI: Tensor) -> None:
    """Replace its weight, in its own layout and type."""
    parameter = layer.get_submodule(projection.name).get_parameter("weight")
    weight = weight_OI.T if projection.transposed else weight_OI
    parameter.data = weight.to(parameter.dtype).contiguous()
