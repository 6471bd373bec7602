"""Find the free channels of a layer that is made sparse: MLP neurons from its anatomy, value channels by a proof."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, arange, nn

from llmprune.anatomy.meta_model import text_config
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.projections import Projection, projections_of
from llmprune.anatomy.selection import slice_rows
from llmprune.anatomy.types import FusedSlice, MlpUnit
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.staged_layer import Order
from llmprune.prune.free_channels.channels import ChannelSource, FreeChannels
from llmprune.prune.free_channels.values import ValueChannels
from llmprune.recipe.sparsity import Sparsity, select


class ChannelFinder:
    """Free channels in one run of pass 2; none where the recipe does not permute."""

    def __init__(self, sparsity: Sparsity | None) -> None:
        self._sparsity = sparsity if sparsity is not None and sparsity.permutes else None
        self._values = ValueChannels()

    def of(
        self,
        forward: LayerwiseForward,
        index: int,
        *,
        layer: nn.Module,
        units: Sequence[MlpUnit],
        order: Order,
        experts: int | None,
    ) -> dict[str, FreeChannels]:
        """Return the free channels of a layer with its weights, by output projection.

        ``units``: its MLPs; ``experts``: kept in each mixture.
        """
        if self._sparsity is None:
            return {}
        group = self._sparsity.parsed.of
        assert group is not None, "only patterns with groups are permuted for"
        chosen = select(projections_of(layer), self._sparsity, experts=experts).chosen
        hidden = text_config(forward.decoder.skeleton.config).hidden_size
        alone = {group[0] for group in order.groups if len(group) == 1} - {unit.output for unit in units}
        outputs = [one for one in chosen if one.outputs == hidden and one.name in alone]
        values = self._values.of(forward, index, layer=layer, order=order, outputs=outputs)
        found = values | dict(neuron_channels(units, chosen, layer=layer))
        return {name: one for name, one in found.items() if one.fits(group)}


def neuron_channels(
    units: Iterable[MlpUnit], chosen: Iterable[Projection], *, layer: nn.Module
) -> Iterator[tuple[str, FreeChannels]]:
    """Yield the output projections of MLPs with their free channels: discovery proved that neurons have no order."""
    widths = {one.name: one.inputs for one in chosen}
    for unit in (one for one in units if one.experts is None):
        width = widths.get(unit.output)
        if width is not None:
            yield unit.output, FreeChannels(arange(width).view(1, 1, -1), tuple(_sources(unit, layer)))


def _sources(unit: MlpUnit, layer: nn.Module) -> Iterator[ChannelSource]:
    """Yield the entries of an MLP's neurons in all tensors but its output projection's weight."""
    for part in unit.tensors[:-1]:
        tensor: Tensor = tensor_of(layer, part.name)
        for entry in range(sum(part.parts)):
            rows_F = slice_rows(tensor.shape[part.dim], FusedSlice(part, entry))
            yield ChannelSource(part.name, part.dim, rows_F[None])
