"""A causal decoder whose layers have weights only while they are visited.

A layer's weights are brought to its device once for all batches, so that a model larger than memory can be run
layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.common.process_memory import trim_if_large
from llmprune.common.window_images import WindowImages
from llmprune.layerwise.disk_waits import DiskWaits
from llmprune.layerwise.emulated_matmul import is_emulated, quick_products
from llmprune.layerwise.transfer import ArrivingLayer, Event, LayerCopies

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerPlacement:
    """Devices that compute the layers. ``resident``: layers that stay on their device after their first visit."""

    devices: tuple[torch.device, ...]
    resident: frozenset[int] = frozenset()


class Decoder:
    """A causal decoder whose layers get their weights only while they are visited.

    ``skeleton``: the model without layer weights but with all others. ``fetch(i)``: tensors of layer i by their names
    in the layer. ``placement``: devices of the layers. ``prefetch(i)``: brings layer i from the disk into the page
    cache; with it the next layer is prepared in the background: prefetched, or for a GPU copied there.
    ``quick``: layers may round differently from the model's own forward where that is much faster.
    ``items_returned``: number of values that a layer of each class returns, 0 for a tensor alone; found while running.
    ``images``: those that token windows refer to. ``waits``: time that the host has waited for layers to be prepared.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        fetch: Callable[[int], Tensors],
        *,
        placement: LayerPlacement,
        prefetch: Callable[[int], None] | None = None,
        quick: bool = False,
        items_returned: dict[type, int] | None = None,
    ) -> None:
        self.skeleton = skeleton
        self.images: WindowImages | None = None
        self.layers_path, self.layers = find_layers(skeleton)
        self.items_returned = {} if items_returned is None else items_returned
        self._fetch, self._prefetch, self._quick = fetch, prefetch, quick
        self.placement = placement
        self.waits = DiskWaits()
        self._resident: dict[int, Tensors | None] = dict.fromkeys(placement.resident)
        self._copies: dict[torch.device, LayerCopies] = {}
        self._held: tuple[int, Tensors] | None = None
        self._ahead: tuple[int, Future[Tensors | ArrivingLayer | None]] | None = None
        self._reader = ThreadPoolExecutor(1, "layers") if prefetch else None
        self._copies_ahead = True

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

    def model_inputs(self, ids_BL: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the model's forward for a batch of windows, on the device of the embeddings."""
        if self.images is None:
            return {"input_ids": ids_BL.to(self.device, non_blocking=True)}
        dtype = self.skeleton.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.images.model_inputs(ids_BL).items()
        }

    def tensors(self, index: int) -> Tensors:
        """Return a layer's tensors on its device, in a dict of the caller's own.

        The tensors of the last layer asked for are held until another layer is asked for, or ``drop_held``. With
        ``prefetch`` the next layer, in the direction of the visits, is prepared in the background.
        """
        if self._held is not None and self._held[0] == index:
            return dict(self._held[1])
        following = index - 1 if self._held is not None and index == self._held[0] - 1 else index + 1
        self._held = None
        trim_if_large()
        brought = self._brought(index)
        tensors = brought.on_compute_stream(self.device_of(index)) if isinstance(brought, ArrivingLayer) else brought
        if index in self._resident:
            self._resident[index] = tensors
        self._held = (index, tensors)
        if self._reader is not None and following in range(len(self)) and self._may_prepare(following):
            self._ahead = (following, self._reader.submit(self._prepare, following, self._end_of_use(following)))
        return dict(tensors)

    def rounds_differently(self, index: int) -> bool:
        """Check that a layer's products are computed faster than, and rounded differently from, the model's own."""
        return self._quick and self.device_of(index).type == "cpu" and is_emulated(self.skeleton.dtype)

    def drop_held(self) -> None:
        """Drop the tensors of the held layer."""
        self._held = None

    def drop_held_and_next(self) -> None:
        """Drop the tensors of the held layer and of the next one, because no layer is visited for some time."""
        if self._ahead is not None:
            self._ahead[1].exception()  # waits for it
        self._held = self._ahead = None

    def release(self) -> None:
        """Drop the tensors of all layers, and the buffers that they are copied through.

        None stays on its device any more, and later visits bring them again.
        """
        self.drop_held_and_next()
        self._resident, self._copies = {}, {}

    def save_memory(self) -> None:
        """Drop the tensors of all layers, and from now on copy none to a GPU before it is visited."""
        self.release()
        self._copies_ahead = False

    def _may_prepare(self, index: int) -> bool:
        return self._copies_ahead or self.device_of(index).type != "cuda"

    def _brought(self, index: int) -> Tensors | ArrivingLayer:
        """Return a layer that was prepared, or prepare it now: in the reader's thread too, which owns its buffers."""
        ahead, self._ahead = self._ahead, None
        if self._reader is None:
            return self._bring(index, self._end_of_use(index))
        if ahead is None or ahead[0] != index:
            ahead = (index, self._reader.submit(self._prepare, index, self._end_of_use(index)))
        start = time.perf_counter()
        prepared = ahead[1].result()
        self.waits.add(time.perf_counter() - start)
        return self._bring(index, None) if prepared is None else prepared

    def _prepare(self, index: int, after: Event | None) -> Tensors | ArrivingLayer | None:
        """Bring a layer to its GPU; for the CPU only prefetch it, for converting it now would take a second layer."""
        if self.device_of(index).type == "cuda":
            return self._bring(index, after)
        if self._prefetch is not None:
            self._prefetch(index)
        return None

    def _end_of_use(self, index: int) -> Event | None:
        """Return an event after all computation so far on the device of a layer; None on other devices than CUDA's."""
        device = self.device_of(index)
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _bring(self, index: int, after: Event | None) -> Tensors | ArrivingLayer:
        kept = self._resident.get(index)
        if kept is not None:
            return kept
        device = self.device_of(index)
        if device.type != "cuda":
            return {name: tensor.to(device) for name, tensor in self._fetch(index).items()}
        if device not in self._copies:
            self._copies[device] = LayerCopies(device)
        return self._copies[device].bring(self._fetch(index), after=after)

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
            _drop_tensors(layer)


def _drop_tensors(module: nn.Module) -> None:
    """Move every parameter back to the meta device."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
