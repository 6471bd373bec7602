"""What is known of a model's structure, as values.

Nothing here names a model family: which tensors hold a neuron or an expert, along
which dimension and in which layout, is data that discovery found and proved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Layout = Literal["plain", "chunked", "interleaved"]


@dataclass(frozen=True)
class TensorCut:
    """One tensor of a layer that has neurons, or experts, along one of its dimensions.

    ``chunked``: the dimension holds the gates of all neurons, then their ups;
    ``interleaved``: gate and up of each neuron lie side by side.
    """

    name: str
    dim: int
    layout: Layout = "plain"


@dataclass(frozen=True)
class MlpUnit:
    """A group of neurons in a layer that can be made fewer.

    ``path`` is the module in the layer that holds it ("" for the layer itself). The last of
    ``tensors`` is the weight whose inputs are the neurons' activations. ``width`` is ``times`` the value
    of the config's ``field``. ``experts``: how many
    experts its tensors stack along their first dimension, each with neurons of its own; None
    where there is one. ``refit``: whether every token goes through it, so that it can be solved again.
    """

    path: str
    tensors: tuple[TensorCut, ...]
    width: int
    field: str
    times: int
    experts: int | None
    refit: bool

    @property
    def output(self) -> str:
        """The module that holds the output projection."""
        return self.tensors[-1].name.rpartition(".")[0]


@dataclass(frozen=True)
class WidthGroup:
    """All units that one config field sets the width of: a unit is a whole number of times as wide."""

    field: str
    width: int
    refusal: str | None  # why it cannot be cut; then its units are not among the anatomy's


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of one layer: the module that runs them, and every tensor with an entry for each."""

    path: str
    tensors: tuple[TensorCut, ...]


@dataclass(frozen=True)
class Experts:
    """How many experts each mixture has, by which config field, and how many of them a token takes."""

    field: str
    count: int
    top_k: int | None
    refusal: str | None  # why none can be removed


@dataclass(frozen=True)
class Anatomy:
    """The prunable structure of one model; ``*_refusal`` says why a cut is not possible."""

    model_type: str
    layers_path: str
    num_layers: int
    layer_classes: tuple[str, ...]
    units: tuple[tuple[MlpUnit, ...], ...]
    groups: tuple[WidthGroup, ...]
    blocks: tuple[ExpertBlock | None, ...]
    experts: Experts | None  # None where no layer has a mixture of experts
    one_of: tuple[int, ...]  # layers of which at least one must stay; empty where any may go
    depth_refusal: str | None
    width_refusal: str | None  # None where at least one group can be cut

    @property
    def widths(self) -> dict[str, int]:
        """Width of every group that can be cut, by config field."""
        return {group.field: group.width for group in self.groups if group.refusal is None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
