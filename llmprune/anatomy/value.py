"""What is known of a model's structure, as values.

Nothing here names a model family: which tensors hold a neuron, along which
dimension and in which layout, is data that discovery found and proved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Layout = Literal["plain", "chunked", "interleaved"]


@dataclass(frozen=True)
class TensorCut:
    """One tensor of a layer that has neurons along one of its dimensions.

    ``chunked``: the dimension holds the gates of all neurons, then their ups;
    ``interleaved``: gate and up of each neuron lie side by side.
    """

    name: str
    dim: int
    layout: Layout = "plain"


@dataclass(frozen=True)
class MlpUnit:
    """A group of neurons in a layer that can be made fewer.

    ``path`` is the module in the layer that holds it ("" for the layer itself),
    ``output`` the projection whose inputs are the neurons' activations,
    ``output_dim`` the dimension of its weight that runs over neurons.
    """

    path: str
    output: str
    output_dim: int
    tensors: tuple[TensorCut, ...]
    width: int
    field: str


@dataclass(frozen=True)
class Anatomy:
    """The prunable structure of one model; ``*_refusal`` says why a cut is not possible."""

    model_type: str
    layers_path: str
    num_layers: int
    layer_classes: tuple[str, ...]
    units: tuple[tuple[MlpUnit, ...], ...]
    one_of: tuple[int, ...]  # layers of which at least one must stay; empty where any may go
    depth_refusal: str | None
    width_refusal: str | None

    @property
    def width(self) -> int | None:
        """MLP width that the model's units share; None where there is no unit."""
        widths = {unit.width for units in self.units for unit in units}
        return widths.pop() if len(widths) == 1 else None

    @property
    def width_field(self) -> str | None:
        """The config field that a reload reads the width from."""
        fields = {unit.field for units in self.units for unit in units}
        return fields.pop() if len(fields) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"width": self.width, "width_field": self.width_field}
