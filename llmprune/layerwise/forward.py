"""The walk: visit the decoder layers in order, run every batch through each.

Only hidden states live between layers, so each layer's weights are brought to
its device once for all batches and a model larger than memory can be walked.

Shapes: N windows, B batch, L sequence length, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import find_layers
from llmprune.common.errors import ModelError, NumericalError
from llmprune.common.process_memory import trim
from llmprune.layerwise.emulated_matmul import is_emulated, quick_products
from llmprune.layerwise.hidden_states import HiddenStates, HiddenStateStore
from llmprune.layerwise.layer_calls import LayerCall, SharedValues, record_calls, run_tail, same_value

Tensors = dict[str, Tensor]


class Decoder:
    """A causal decoder whose layers get their weights only while they are visited.

    ``skeleton`` is the model without layer weights but with all others; ``fetch(i)``
    gives layer i's tensors by their names in the layer; ``device_of(i)`` says where it runs.
    ``quick`` layers may round otherwise than the model's own forward where that is much faster.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        fetch: Callable[[int], Tensors],
        *,
        device_of: Callable[[int], torch.device],
        fetch_ahead: bool = False,
        quick: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.layers_path, self.layers = find_layers(skeleton)
        self.device_of = device_of
        self.returns_tuple: dict[type, int] = {}  # items of what a layer of a class returns; 0: a tensor alone
        self._fetch, self._quick = fetch, quick
        self._held: tuple[int, Tensors] | None = None
        self._ahead: tuple[int, Future[Tensors]] | None = None
        self._reader = ThreadPoolExecutor(1, "fetch") if fetch_ahead else None

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """Where tokens go in: the embeddings' device. What lies outside the layers is there too."""
        embedding: Tensor = next(self.skeleton.get_input_embeddings().parameters())
        return embedding.device

    def tensors(self, index: int) -> Tensors:
        """A layer's tensors on its device. The layer last asked for is held until another is, or ``forget``.

        With ``fetch_ahead`` the next layer, in the direction that layers are asked for, is brought in the background.
        """
        if self._held is not None and self._held[0] == index:
            return self._held[1]
        following = index - 1 if self._held is not None and index == self._held[0] - 1 else index + 1
        self._held = None
        if self._reader is not None:
            trim()
        ahead, self._ahead = self._ahead, None
        tensors = ahead[1].result() if ahead and ahead[0] == index else self._bring(index)
        self._held = (index, tensors)
        if self._reader is not None and following in range(len(self)):
            self._ahead = (following, self._reader.submit(self._bring, following))
        return tensors

    def rounds_otherwise(self, index: int) -> bool:
        """Whether a layer's products are not rounded as the model's own forward does: then they are quicker."""
        return self._quick and self.device_of(index).type == "cpu" and is_emulated(self.skeleton.dtype)

    def forget(self) -> None:
        """Let the held layer go."""
        self._held = None

    def _bring(self, index: int) -> Tensors:
        device = self.device_of(index)
        return {name: tensor.to(device) for name, tensor in self._fetch(index).items()}

    @contextmanager
    def layer(self, index: int, tensors: Tensors | None = None) -> Iterator[nn.Module]:
        """The layer with its weights (or these) on its device; they go when the visit ends."""
        layer = self.layers[index]
        device = self.device_of(index)
        layer.load_state_dict(self.tensors(index) if tensors is None else tensors, assign=True)
        layer.requires_grad_(False)
        for module in layer.modules():  # buffers that no checkpoint holds stay on the skeleton's device
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        try:
            with quick_products() if self.rounds_otherwise(index) else nullcontext():
                yield layer
        finally:
            release(layer)


def release(module: nn.Module) -> None:
    """Put every parameter back on the meta device."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


class LayerwiseForward:
    """A decoder's stream of hidden states over a fixed set of token windows.

    ``streams[b]`` holds the hidden states [B, L, D] of batch b before the next layer.
    """

    @torch.no_grad()
    def __init__(
        self, decoder: Decoder, windows_NL: Tensor, *, batch_size: int, store: HiddenStateStore | None = None
    ) -> None:
        self.decoder = decoder
        self.batches: list[Tensor] = list(torch.split(windows_NL, batch_size))
        self.streams = HiddenStates()
        self._store = store or HiddenStateStore()
        self.calls: list[list[LayerCall]] = []
        shared = SharedValues()
        for ids_BL in self.batches:
            shared.start_batch()
            hidden_BLD, calls = self._record(ids_BL, shared)
            if not self.calls:
                self.streams = self._store.open(hidden_BLD, len(windows_NL))
            self.streams.append(hidden_BLD)
            self.calls.append(calls)

    @torch.no_grad()
    def restart(self) -> None:
        """Put the streams back before the first layer."""
        for batch, ids_BL in enumerate(self.batches):
            self.streams[batch] = self._record(ids_BL, SharedValues())[0]

    def _record(self, ids_BL: Tensor, shared: SharedValues) -> tuple[Tensor, list[LayerCall]]:
        """Hidden states before the first layer, and the call of every layer."""
        decoder = self.decoder
        ids_BL = ids_BL.to(decoder.device)
        return record_calls(
            decoder.skeleton,
            decoder.layers,
            ids_BL=ids_BL,
            shared=shared,
            run_layer=self._run_layer,
            returns_tuple=decoder.returns_tuple,
        )

    def _run_layer(self, index: int, call: LayerCall, hidden_BLD: Tensor) -> Any:  # noqa: PLR0917 - a callback
        tap = self.decoder.layers[index].__dict__.pop("forward")  # the layer's own forward, for this once
        try:
            with self.decoder.layer(index) as layer:
                return call.returned(layer, hidden_BLD.to(self.decoder.device_of(index)))
        finally:
            self.decoder.layers[index].forward = tap

    @torch.no_grad()
    def outputs(self, index: int, layer: nn.Module) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch number, hidden states before, hidden states after) of one layer, batch by batch.

        The streams stay as they are: ``advance`` sets them. Raises NumericalError on NaN or infinity.
        """
        for batch, stream_BLD in enumerate(self.streams):
            hidden_BLD = stream_BLD.to(self.decoder.device_of(index))
            yield batch, hidden_BLD, self.output(batch, index, layer=layer, hidden_BLD=hidden_BLD)

    @torch.no_grad()
    def output(self, batch: int, index: int, *, layer: nn.Module, hidden_BLD: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] of one batch after one layer, from its stream or from these before it.

        Raises NumericalError on NaN or infinity.
        """
        if hidden_BLD is None:
            hidden_BLD = self.streams[batch].to(self.decoder.device_of(index))
        output_BLD = self.calls[batch][index].run(layer, hidden_BLD)
        total = output_BLD.sum(dtype=torch.float32)  # not finite where any of them is not
        if not torch.isfinite(total) and not torch.isfinite(output_BLD).all():
            raise NumericalError(
                f"layer {index} puts out NaN or infinity for calibration batch {batch}; "
                "try model.dtype: float32 or bfloat16, and check the checkpoint's weights"
            )
        return output_BLD

    def advance(self, batch: int, output_BLD: Tensor) -> None:
        """Make these the hidden states before the next layer."""
        self.streams[batch] = output_BLD

    def copy(self, tokens: slice = slice(None)) -> HiddenStates:
        """The streams as they are now, or only these tokens of each window, kept where streams are."""
        copied = self.room(self.streams[0][:, tokens])
        for hidden_BLD in self.streams:
            some_BLD = hidden_BLD[:, tokens]  # a view, which would keep the whole batch
            copied.append(hidden_BLD if some_BLD.shape == hidden_BLD.shape else some_BLD.clone())
        return copied

    def room(self, first_BLX: Tensor) -> HiddenStates:
        """Room for values of every batch, shaped like these of the first, kept where streams are."""
        return self._store.open(first_BLX, sum(map(len, self.batches)))

    def pass_through(self, index: int, layer: nn.Module) -> None:
        """Run every batch through the layer."""
        for batch, _, output_BLD in self.outputs(index, layer):
            self.advance(batch, output_BLD)

    def pass_and_keep(self, index: int, layer: nn.Module, *, projection: nn.Module) -> HiddenStates:
        """Run every batch through the layer; returns the outputs [B, L, X] of a projection, kept where streams are."""
        seen: list[Tensor] = []
        kept = HiddenStates()
        with outputs_of(projection, seen.append):
            for batch, hidden_BLD, output_BLD in self.outputs(index, layer):
                written_BLX = seen.pop().view(*hidden_BLD.shape[:2], -1)
                if not batch:
                    kept = self.room(written_BLX)
                kept.append(written_BLX)
                self.advance(batch, output_BLD)
        return kept

    @torch.no_grad()
    def logits(self, batch: int) -> Tensor:
        """Logits [B, L, V] of a batch whose stream has left the last layer."""
        return self.logits_of(self.batches[batch], self.streams[batch])

    def logits_of(self, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Logits [B, L, V] made of these hidden states after the last layer, with gradients where they are on."""
        decoder = self.decoder
        return run_tail(
            decoder.skeleton,
            decoder.layers,
            ids_BL=ids_BL.to(decoder.device),
            hidden_BLD=hidden_BLD.to(decoder.device),
            returns_tuple=decoder.returns_tuple,
        )


def require_same_calls(dense: LayerwiseForward, pruned: LayerwiseForward, *, layers: Sequence[int]) -> None:
    """Raise ModelError unless each kept layer gets the arguments (masks, rotary embeddings) that it got before."""
    for dense_calls, calls in zip(dense.calls, pruned.calls, strict=True):
        for new, old in enumerate(layers):
            before, now = dense_calls[old], calls[new]
            if not same_value((before.args, before.kwargs), (now.args, now.kwargs)):
                raise ModelError(
                    f"layer {old} would become layer {new} and be called with other arguments there (a mask or "
                    "positions); its config cannot express this cut"
                )


@contextmanager
def inputs_of(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the input of every call of a module, while the context lasts."""
    handle = module.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def outputs_of(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the output of every call of a module, while the context lasts."""
    handle = module.register_forward_hook(lambda _, __, output: see(output))
    try:
        yield
    finally:
        handle.remove()
