"""Activations of a finished layer with all residual channels, towards which the narrow layer is repaired.

Shapes: B batch, L sequence length, D hidden size, K residual channels kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.anatomy.residual_channels import readers_of
from llmprune.anatomy.types import HiddenDim
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.staged_layer import Order
from llmprune.prune.channels.norm_scale import NormScale
from llmprune.prune.repair.residual_writers import LayerTopology, ResidualWriter


class KeptChannels(HiddenStates):
    """The kept channels of hidden states that others hold."""

    def __init__(self, whole: HiddenStates, keep_K: Tensor) -> None:
        super().__init__()
        self._whole, self._keep_K = whole, keep_K

    def __len__(self) -> int:
        return len(self._whole)

    def at(self, batch: int, device: torch.device) -> Tensor:
        """Return the kept channels [B, L, K] of a batch on a device."""
        return self._whole.at(batch, device).index_select(-1, self._keep_K.to(device))


@dataclass(frozen=True)
class WideReference:
    """Activations of the layer with all channels.

    ``inputs``: of groups of readers, by the first of each group [B, L, D]; ``written``: by residual writer, the stream
    after it in units of its scale, kept channels [B, L, K].
    """

    inputs: dict[str, HiddenStates] = field(default_factory=dict)
    written: dict[str, HiddenStates] = field(default_factory=dict)


def first_readers(order: Order, dims: tuple[HiddenDim, ...]) -> dict[str, tuple[str, ...]]:
    """Return the groups of modules that read channels and share their input, by the first of each."""
    readers = readers_of(dims)
    groups = (tuple(name for name in group if name in readers) for group in order.groups)
    return {group[0]: group for group in groups if group}


@dataclass(frozen=True)
class WideLayer:
    """A finished layer with all channels, with its weights, on the hidden states before it.

    ``order``: of its readers and writers; ``dims``: its tensors with a dimension of channels.
    """

    forward: LayerwiseForward
    index: int
    layer: nn.Module
    topology: LayerTopology
    order: Order
    dims: tuple[HiddenDim, ...]

    @torch.no_grad()
    def record(self, keep_K: Tensor, *, scales: Mapping[str, NormScale]) -> WideReference:
        """Run the layer on every batch, without advancing, and record what the repairs need.

        ``scales``: by norm, its factor, which gets its inputs and outputs.
        """
        found = WideReference()
        with ExitStack() as hooks:
            for name, scale in scales.items():
                handle = self.layer.get_submodule(name).register_forward_hook(scale.see)
                hooks.callback(handle.remove)
            for name in first_readers(self.order, self.dims):
                keep = self._keep(found.inputs, name)
                hooks.enter_context(inputs_of(self.layer.get_submodule(name), keep))
            for writer in self.topology.writers:
                if not writer.is_last:
                    keep = self._keep_stream(found.written, writer, keep_K=keep_K)
                    hooks.enter_context(outputs_of(self.layer.get_submodule(writer.name), keep))
            for _ in self.forward.outputs(self.index, self.layer):
                pass
        return found

    def _keep(
        self, buffers: dict[str, HiddenStates], name: str, *, keep_K: Tensor | None = None
    ) -> Callable[[Tensor], None]:
        """Return a hook that appends values of the running batch, or only their kept channels, to a buffer."""

        def see(value: Tensor) -> None:
            value_BLX = value.view(*self.forward.batches[self.forward.running].shape, -1)
            if keep_K is not None:
                value_BLX = value_BLX.index_select(-1, keep_K.to(value.device))
            self.forward.append(buffers, name, value_BLX=value_BLX)

        return see

    def _keep_stream(
        self, buffers: dict[str, HiddenStates], writer: ResidualWriter, *, keep_K: Tensor
    ) -> Callable[[Tensor], None]:
        """Return a hook on a writer that appends the kept channels of the residual stream after it."""
        append = self._keep(buffers, writer.name, keep_K=keep_K)

        def see(output: Tensor) -> None:
            hidden_BLD = self.forward.hidden_states.at(self.forward.running, output.device)
            append(writer.residual_after(hidden_BLD, output))

        return see
