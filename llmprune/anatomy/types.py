"""What is known of a model's structure, as values.

Nothing here names a model family: which tensors hold a neuron, a group of heads or an
expert, along which dimension and in which layout, is data that discovery found and proved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NO_HEADS = "its config counts no attention heads"  # why none can be removed where an anatomy has no ``heads``


@dataclass(frozen=True)
class PrunableDim:
    """One tensor of a layer that has neurons, groups of heads, or experts along one of its dimensions.

    The dimension is made of ``parts`` one after the other, in each of which every neuron (group, expert) has so
    many entries side by side. (1,): one entry each; (1, 1): the gates of all neurons, then their ups; (2,): gate
    and up of each neuron side by side; (64,): the 64 entries of each group of heads.
    """

    name: str
    dim: int
    parts: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class FusedSlice:
    """One entry of each neuron in a tensor: all of it, or where it fuses gate and up, one of the two."""

    tensor: PrunableDim
    entry: int


@dataclass(frozen=True)
class Unit:
    """A part of a layer that can be made smaller.

    ``path`` is the module in the layer that holds it ("" for the layer itself). The last of
    ``tensors`` is the weight of its output projection, which has ``width`` inputs.
    """

    path: str
    tensors: tuple[PrunableDim, ...]
    width: int

    @property
    def output(self) -> str:
        """The module that holds the output projection."""
        return self.tensors[-1].name.rpartition(".")[0]


@dataclass(frozen=True)
class MlpUnit(Unit):
    """A group of neurons: the inputs of its output projection are their activations.

    ``width`` is ``times`` the value of the config's ``field``. ``experts``: how many
    experts its tensors stack along their first dimension, each with neurons of its own; None
    where there is one. ``refit``: whether every token goes through it, so that it can be solved again.
    ``up``: the weight whose outputs its activations are proportional to, if it is gated; None of others and experts.
    """

    field: str
    times: int
    experts: int | None
    refit: bool
    up: FusedSlice | None = None


@dataclass(frozen=True)
class AttentionUnit(Unit):
    """The attention of a layer, whose heads go by key-value groups: the inputs of its output projection are what
    the query heads read, those of a group side by side.

    ``refit``: whether every token goes through it, so that its output projection can be solved again.
    """

    refit: bool


@dataclass(frozen=True)
class WidthGroup:
    """All units that one config field sets the width of: a unit is a whole number of times as wide."""

    field: str
    width: int
    refusal: str | None  # why it cannot be cut; then its units are not among the anatomy's


@dataclass(frozen=True)
class Heads:
    """The key-value groups of attention heads, as many in every layer that has attention units.

    ``per_group``: config fields that count what each group has; ``fixed``: fields that must say what the config
    leaves to a formula with the number of heads in it. ``possible``: the smaller numbers that a config accepts.
    """

    count: int
    per_group: dict[str, int]
    fixed: dict[str, int]
    possible: tuple[int, ...]
    refusal: str | None  # why none can be removed; then no layer has an attention unit

    @property
    def queries(self) -> int:
        """Query heads of each group."""
        return max(self.per_group.values())

    def fields(self, groups: int) -> dict[str, int]:
        """The values of the config's fields with so many groups."""
        return {name: each * groups for name, each in self.per_group.items()} | self.fixed


@dataclass(frozen=True)
class LayerPattern:
    """Something that differs between layers and repeats every ``period`` layers.

    ``name``: the config's list, or the attribute of the layers' modules, that shows it; ``kinds``: what each layer is.
    """

    name: str
    period: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of one layer: the module that runs them, and every tensor with an entry for each."""

    path: str
    tensors: tuple[PrunableDim, ...]


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
    attention: tuple[AttentionUnit | None, ...]
    heads: Heads | None  # None where the config counts no attention heads
    blocks: tuple[ExpertBlock | None, ...]
    experts: Experts | None  # None where no layer has a mixture of experts
    patterns: tuple[LayerPattern, ...]  # empty where no kind of layer repeats
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


def unit_key(layer: int, unit_path: str) -> str:
    """Name of one layer's unit: ``12.mlp``; ``12`` where the neurons lie in the layer itself."""
    return f"{layer}.{unit_path}" if unit_path else str(layer)
