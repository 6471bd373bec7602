"""A causal decoder whose layers have weights only while they are visited.

A layer's weights are brought to its device once for all batches, so that a model larger than memory can be run
layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.layerwise.emulated_matmul import is_emulated, quick_products

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerPlacement:
    """Devices that compute the layers. ``resident``: layers that stay on their device after their first visit."""

    devices: tuple[torch.device, ...]
    resident: frozenset[int] = frozenset()


class Decoder:
    """A causal decoder whose layers get their weights only while they are visited.

    ``skeleton``: the model without layer weights but with all others. ``fetch(i)``: tensors of layer i by their names
    in the layer. ``placement``: devices of the layers. ``fetch_ahead``: read the next layer in the background.
    ``quick``: layers may round differently from the model's own forward where that is much faster.
    ``items_returned``: number of values that a layer of each class returns, 0 for a tensor alone; found while running.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        fetch: Callable[[int], Tensors],
        *,
        placement: LayerPlacement,
        fetch_ahead: bool = False,
        quick: bool = False,
        items_returned: dict[type, int] | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.layers_path, self.layers = find_layers(skeleton)
        self.items_returned = {} if items_returned is None else items_returned
        self._fetch, self._quick = fetch, quick
        self.placement = placement
        self._resident: dict[int, Tensors | None] = dict.fromkeys(placement.resident)
        self._held: tuple[int, Tensors] | None = None
        self._ahead: tuple[int, Future[Tensors]] | None = None
        self._reader = ThreadPoolExecutor(1, "fetch") if fetch_ahead else None

    def __len__(self) -> int:
        return len(self.layers)

    def device_of(self, index: int) -> torch.device:
        """Return the device that computes a layer."""
        return self.placement.devices[index]

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, where token ids are needed. Modules outside the layers are on it too."""
        embedding: Tensor = next(self.skeleton.get_input_embeddings().parameters())
        return embedding.device

    def tensors(self, index: int) -> Tensors:
        """Return a layer's tensors on its device, in a dict of the caller's own.

        The tensors of the last layer asked for are held until another layer is asked for, or ``forget``. With
        ``fetch_ahead`` the next layer, in the direction of the visits, is read in the background.
        """
        if self._held is not None and self._held[0] == index:
            return dict(self._held[1])
        following = index - 1 if self._held is not None and index == self._held[0] - 1 else index + 1
        self._held = None
        ahead, self._ahead = self._ahead, None
        tensors = ahead[1].result() if ahead and ahead[0] == index else self._bring(index)
        self._held = (index, tensors)
        if self._reader is not None and following in range(len(self)):
            self._ahead = (following, self._reader.submit(self._bring, following))
        return dict(tensors)

    def rounds_differently(self, index: int) -> bool:
        """Check that a layer's products are computed faster than, and rounded differently from, the model's own."""
        return self._quick and self.device_of(index).type == "cpu" and is_emulated(self.skeleton.dtype)

    def forget(self) -> None:
        """Drop the tensors of the held layer."""
        self._held = None

    def _bring(self, index: int) -> Tensors:
        kept = self._resident.get(index)
        if kept is not None:
            return kept
        device = self.device_of(index)
        tensors = {name: tensor.to(device) for name, tensor in self._fetch(index).items()}
        if index in self._resident:
            self._resident[index] = tensors
        return tensors

    @contextmanager
    def layer(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Yield the layer with its own or the given tensors on its device; it has none when the context ends."""
        layer = self.layers[index]
        device = self.device_of(index)
        layer.load_state_dict(self.tensors(index) if tensors is None else tensors, assign=True)
        layer.requires_grad_(False)
        for module in layer.modules():  # buffers that no checkpoint holds are on the skeleton's device
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        try:
            with quick_products() if self.rounds_differently(index) else nullcontext():
                yield layer
        finally:
            release(layer)


def release(module: nn.Module) -> None:
    """Move every parameter back to the meta device."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
