"""Projections of a layer: modules that multiply by one matrix, stored as nn.Linear or as Conv1D does.

Shapes in names: O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Projection:
    """A linear projection of a layer.

    ``name``: of the module in the layer; ``transposed``: its weight is stored [I, O], as in GPT-2.
    """

    name: str
    outputs: int
    inputs: int
    transposed: bool


def projections_of(layer: nn.Module) -> tuple[Projection, ...]:
    """Return the projections of a layer, which may be on the meta device."""
    return tuple(
        Projection(name, outputs, module.weight.numel() // outputs, isinstance(module, Conv1D))
        for name, module in layer.named_modules()
        if (outputs := outputs_of_projection(module)) is not None
    )


def outputs_of_projection(module: nn.Module) -> int | None:
    """Return the number of outputs of a projection; None for other modules."""
    if isinstance(module, nn.Linear):
        return int(module.weight.shape[0])
    return int(module.weight.shape[1]) if isinstance(module, Conv1D) else None


def weight_of(layer: nn.Module, projection: Projection) -> Tensor:
    """Return the weight of a projection [O, I] in its own type; a transposed view where it is stored [I, O]."""
    weight = layer.get_submodule(projection.name).get_parameter("weight")
    return weight.T if projection.transposed else weight


def set_weight(layer: nn.Module, projection: Projection, *, weight_OI: Tensor) -> None:
    """Replace the weight of a projection, converted to the stored layout and type."""
    parameter = layer.get_submodule(projection.name).get_parameter("weight")
    weight = weight_OI.T if projection.transposed else weight_OI
    parameter.data = weight.to(parameter.dtype).contiguous()
