"""The structure of a model as values: its layers, prunable units, and the config fields that set their sizes.

No model family is named: the tensors that hold a neuron, a key-value group or an expert, with dimension and layout, are
data that discovery found and proved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

NO_HEADS = "its config counts no attention heads"  # the refusal of an anatomy without ``heads``


@dataclass(frozen=True)
class PrunableDim:
    """A tensor of a layer, and its dimension that has neurons, key-value groups or experts.

    The dimension consists of consecutive ``parts``; in each, every neuron (group, expert) has that many adjacent
    entries. (1,): one entry each; (1, 1): the gates of all neurons, then their ups; (2,): gate and up of each neuron
    adjacent; (64,): 64 entries of each group.
    """

    name: str
    dim: int
    parts: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class FusedSlice:
    """One entry of each neuron in a tensor: the whole tensor, or of one that fuses gate and up, one of the two."""

    tensor: PrunableDim
    entry: int


@dataclass(frozen=True)
class Unit:
    """A prunable unit of a layer.

    ``path``: the module in the layer that holds it ("" for the layer itself); ``tensors``: the last is the weight of
    its output projection, which has ``width`` inputs.
    """

    path: str
    tensors: tuple[PrunableDim, ...]
    width: int

    @property
    def output(self) -> str:
        """Name of the output projection in the layer."""
        return self.tensors[-1].name.rpartition(".")[0]


@dataclass(frozen=True)
class MlpUnit(Unit):
    """Neurons of an MLP: their activations are the inputs of its output projection.

    ``width`` is ``times`` the value of the config's ``field``. ``experts``: the number of experts that its tensors
    stack along their first dimension, each with its own neurons; None for an MLP without experts. ``refit``: True if
    every token reaches it, so that it can be refit. ``up``: the up projection of a gated MLP, to whose outputs the
    activations are proportional; None for others and for experts.
    """

    field: str
    times: int
    experts: int | None
    refit: bool
    up: FusedSlice | None = None


@dataclass(frozen=True)
class AttentionUnit(Unit):
    """Attention of a layer, whose heads are removed by key-value groups.

    The inputs of its output projection are the outputs of the query heads, those of a group adjacent. ``refit``: True
    if every token reaches it, so that its output projection can be refit.
    """

    refit: bool


@dataclass(frozen=True)
class WidthGroup:
    """All units whose width one config field sets: the width of each is a multiple of the field's value."""

    field: str
    width: int
    refusal: str | None  # the reason why it cannot be cut; then the anatomy does not list its units


@dataclass(frozen=True)
class Heads:
    """The key-value groups of attention heads; every layer with an attention unit has ``count`` of them.

    ``per_group``: config fields that count heads, with the number in each group; ``fixed``: fields that must be stated
    because the config would derive them from the number of heads; ``possible``: smaller counts that a config accepts.
    """

    count: int
    per_group: dict[str, int]
    fixed: dict[str, int]
    possible: tuple[int, ...]
    refusal: str | None  # the reason why none can be removed; then no layer has an attention unit

    @property
    def queries(self) -> int:
        """Query heads of each group."""
        return max(self.per_group.values())

    def fields(self, groups: int) -> dict[str, int]:
        """Return the values of the config's fields for a number of groups."""
        return {name: each * groups for name, each in self.per_group.items()} | self.fixed


@dataclass(frozen=True)
class HiddenDim:
    """A tensor's dimension of residual channels. ``role``: what the tensor does with them.

    ``reads``: its inputs are channels, as of query, gate and router projections and the head. ``writes``: its outputs
    are channels, as of output projections with their biases, and embeddings. ``scales``: a weight for each channel, of
    a norm; ``shifts``: a norm's bias. ``has_offset``: the norm multiplies by one plus this weight.
    """

    name: str
    dim: int
    role: Literal["reads", "writes", "scales", "shifts"]
    has_offset: bool = False

    @property
    def module(self) -> str:
        """Path of the module that holds the tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class HiddenSize:
    """The residual channels of the whole model, whose number one config field sets.

    ``fixed``: fields that must be stated because the config would derive them from the hidden size; ``possible``:
    smaller numbers that the config accepts. ``layers``: tensors by layer, by their names in it; ``outside``: those
    outside the layers, by their names in the model.
    """

    field: str
    size: int
    fixed: dict[str, int]
    possible: tuple[int, ...]
    layers: tuple[tuple[HiddenDim, ...], ...]
    outside: tuple[HiddenDim, ...]
    refusal: str | None  # the reason why no channel can be removed

    def fields(self, kept: int) -> dict[str, int]:
        """Return the values of the config's fields for a number of channels."""
        return {self.field: kept} | self.fixed


@dataclass(frozen=True)
class LayerPattern:
    """A difference between layers that repeats every ``period`` layers.

    ``name``: the config's list, or the attribute of the layers' modules, that shows it; ``kinds``: of each layer.
    """

    name: str
    period: int
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class IndexKinds:
    """A difference between layers that follows from their index: a layer can only become one at an index of its kind.

    ``name``: the attribute or module of the layers that shows it, "class" for that of the layer itself; ``kinds``: of
    each layer.
    """

    name: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of one layer: the path of the module that runs them, and all tensors with an entry for each."""

    path: str
    tensors: tuple[PrunableDim, ...]


@dataclass(frozen=True)
class Experts:
    """Number of experts in each mixture, the config field that sets it, and the ``top_k`` a token is routed to.

    ``groups``: equal groups of consecutive experts, of which the router chooses some first; 1 for a router without
    groups. ``fewest``: experts that must be kept.
    """

    field: str
    count: int
    top_k: int | None
    refusal: str | None  # the reason why none can be removed
    groups: int = 1
    fewest: int = 1

    @property
    def possible(self) -> range:
        """Numbers of experts that can be kept, ascending; each group loses the same number."""
        return range(self.fewest, self.count + 1, self.groups)


@dataclass(frozen=True)
class Anatomy:
    """The prunable structure of one model. ``*_refusal``: the reason why a cut is not possible."""

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
    one_of: tuple[int, ...]  # layers of which at least one must be kept; empty where any may be removed
    by_index: tuple[IndexKinds, ...]  # empty where any layers may be removed, but for ``one_of``
    depth_refusal: str | None
    width_refusal: str | None  # None where at least one group can be cut
    hidden: HiddenSize | None = None  # None where it was not looked for (``hidden_size.find_hidden_size``)

    @property
    def widths(self) -> dict[str, int]:
        """Widths of all groups that can be cut, by config field."""
        return {group.field: group.width for group in self.groups if group.refusal is None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def routed_units(anatomy: Anatomy, layer: int) -> tuple[MlpUnit, ...]:
    """Return the routed experts of a layer, if it is known which tokens each of them gets."""
    if anatomy.experts is None or anatomy.experts.refusal:
        return ()
    return tuple(unit for unit in anatomy.units[layer] if unit.experts is not None)


def unit_key(layer: int, unit_path: str) -> str:
    """Return the name of one layer's unit: ``12.mlp``; ``12`` where the layer itself holds the neurons."""
    return f"{layer}.{unit_path}" if unit_path else str(layer)
