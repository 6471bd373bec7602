"""Find the value channels of an attention layer whose order is free within a head, and prove it on the layer itself.

Candidates are places of the value rows among the outputs of a projection: the last rows (a value projection, or one
that fuses queries, keys and values as blocks), or the last rows of each group (fused head by head, or the values that
multi-head latent attention decompresses). The proof: with the value rows and the columns of the output projection
permuted alike, by a random order for each head, the projection returns the same on calibration windows; and with only
the columns permuted it does not.

Shapes: S key-value heads, Q query heads of each, C channels of a head, B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.heads import count_heads
from llmprune.anatomy.hooks import outputs_of
from llmprune.anatomy.names import tensor_of
from llmprune.anatomy.projections import Projection, projections_of
from llmprune.anatomy.proof import equal_up_to_rounding
from llmprune.common.distributed import broadcast_from_first
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.staged_layer import Order
from llmprune.prune.free_channels.channels import ChannelSource, FreeChannels
from llmprune.prune.repair.residual_writers import kind_of

_TOLERANCE = {torch.float32: 1e-4}
_TOLERANCE_OF_16_BITS = 2e-2  # a permuted sum is rounded otherwise


class ValueChannels:
    """Value channels of layers, found once for each kind of layer."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, FreeChannels]] = {}

    def of(
        self, forward: LayerwiseForward, index: int, *, layer: nn.Module, order: Order, outputs: Sequence[Projection]
    ) -> dict[str, FreeChannels]:
        """Return the free channels of a layer with its weights, by output projection.

        ``outputs``: projections that may be output projections of attention; most layers have one, or none.
        """
        kind = kind_of(layer)
        if kind not in self._known:
            found = {one.name: self._find(forward, index, layer=layer, order=order, output=one) for one in outputs}
            self._known[kind] = broadcast_from_first({name: one for name, one in found.items() if one is not None})
        return self._known[kind]

    def _find(
        self, forward: LayerwiseForward, index: int, *, layer: nn.Module, order: Order, output: Projection
    ) -> FreeChannels | None:
        """Return the first candidate that is proven."""
        names = [name for group in order.groups for name in group]
        earlier = names[: names.index(output.name)] if output.name in names else []
        by_name = {one.name: one for one in projections_of(layer)}
        before_BLD: Tensor | None = None
        for candidate in _candidates(
            forward, output, values=[by_name[name] for name in reversed(earlier)], layer=layer
        ):
            if before_BLD is None:
                before_BLD = _output(forward, index, layer=layer, name=output.name)
            if _is_free(candidate, before_BLD, forward=forward, index=index, layer=layer, output=output):
                return candidate
        return None


def _candidates(
    forward: LayerwiseForward, output: Projection, *, values: Sequence[Projection], layer: nn.Module
) -> Iterator[FreeChannels]:
    """Yield free channels as they may be. ``values``: projections that may compute the values, likely ones first."""
    heads = count_heads(forward.decoder.skeleton.config)
    queries = heads.count * heads.queries if heads else 0
    if heads is None or output.inputs % queries:
        return
    size = output.inputs // queries
    divisors = [groups for groups in range(queries, 0, -1) if queries % groups == 0]
    divisors.sort(key=lambda groups: groups != heads.count)  # the config of some families counts no key-value heads
    for projection in values:
        for groups in divisors:
            columns_SQC = torch.arange(output.inputs).view(groups, queries // groups, size)
            for rows_SC in _rows(projection.outputs, groups, size=size):
                yield FreeChannels(columns_SQC, tuple(_sources(layer, projection, rows_SC=rows_SC)))


def _rows(outputs: int, groups: int, *, size: int) -> Iterator[Tensor]:
    """Yield rows [S, C] that may be the values: the last of all outputs, and the last of each group's outputs."""
    if outputs < groups * size:
        return
    yield torch.arange(outputs)[-groups * size :].view(groups, size)
    if outputs % groups == 0 and outputs > groups * size and groups > 1:
        yield torch.arange(outputs).view(groups, -1)[:, -size:]


def _sources(layer: nn.Module, projection: Projection, *, rows_SC: Tensor) -> Iterator[ChannelSource]:
    yield ChannelSource(f"{projection.name}.weight", 1 if projection.transposed else 0, rows_SC)
    if getattr(layer.get_submodule(projection.name), "bias", None) is not None:
        yield ChannelSource(f"{projection.name}.bias", 0, rows_SC)


def _is_free(
    channels: FreeChannels,
    before_BLD: Tensor,
    *,
    forward: LayerwiseForward,
    index: int,
    layer: nn.Module,
    output: Projection,
) -> bool:
    """Prove that the order of the channels is free within each set."""
    sets, _, size = channels.columns_SQC.shape
    generator = torch.Generator().manual_seed(0)
    order_SC = torch.stack([torch.randperm(size, generator=generator) for _ in range(sets)])
    columns = ChannelSource(f"{output.name}.weight", 0 if output.transposed else 1, torch.arange(output.inputs)[None])
    only_columns = FreeChannels(channels.columns_SQC, (columns,))
    order_1I = channels.inputs(order_SC)[None]
    tolerance = _TOLERANCE.get(before_BLD.dtype, _TOLERANCE_OF_16_BITS)
    with _restored(layer, [columns, *channels.sources]):
        only_columns.permute_sources(layer, order_1I)
        control_BLD = _output(forward, index, layer=layer, name=output.name)
        channels.permute_sources(layer, order_SC)
        after_BLD = _output(forward, index, layer=layer, name=output.name)
    is_equal = equal_up_to_rounding(after_BLD, before_BLD, tolerance=tolerance)
    return is_equal and not equal_up_to_rounding(control_BLD, before_BLD, tolerance=tolerance)


@contextmanager
def _restored(layer: nn.Module, sources: Sequence[ChannelSource]) -> Iterator[None]:
    """Set tensors back to their values at the end."""
    values = {source.name: tensor_of(layer, source.name).data for source in sources}
    try:
        yield
    finally:
        for name, value in values.items():
            tensor_of(layer, name).data = value


class _ReachedError(Exception):
    """The projection whose output is wanted has returned."""


def _output(forward: LayerwiseForward, index: int, *, layer: nn.Module, name: str) -> Tensor:
    """Return the output of a projection on the first batch; later modules are not run."""
    seen: list[Tensor] = []

    def stop(value: Tensor) -> None:
        seen.append(value)
        raise _ReachedError

    with suppress(_ReachedError), outputs_of(layer.get_submodule(name), stop):
        forward.output(0, index, layer=layer)
    return seen[0]
