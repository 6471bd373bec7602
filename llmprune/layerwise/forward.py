"""Layer-wise forward pass: all windows go through one decoder layer before the next is touched.

Between layers only hidden states are kept, in a ``HiddenStateStore``.

Shapes: N windows, B batch, L sequence length, D hidden size, P some positions, V vocabulary,
X any features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import outputs_of
from llmprune.common.errors import ModelError
from llmprune.common.pinned_memory import pinning
from llmprune.layerwise.counted_targets import CountedTargets
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.finite_outputs import FiniteOutputs
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.layerwise.layer_calls import LayerCall, ReceivedCall, record_calls, run_tail, same_value
from llmprune.layerwise.shared_values import SharedValues


class LayerOutput(NamedTuple):
    """Hidden states [B, L, D] of one batch before and after a layer."""

    batch: int
    hidden_BLD: Tensor
    output_BLD: Tensor


class LayerwiseForward:
    """A decoder's hidden states for a fixed set of token windows, advanced layer by layer.

    ``hidden_states[b]``: those of batch b before the next layer [B, L, D]. ``calls[b][i]``: arguments of layer i for
    batch b. ``store`` decides whether hidden states are in memory or in a file. ``targets``: the tokens whose
    prediction counts in a loss: all but those of ``begin``, the begin-of-text ids, from position ``first_target`` of a
    window on. ``running``: the batch that a layer ran last, for hooks.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        windows_NL: Tensor,
        *,
        batch_size: int,
        store: HiddenStateStore | None = None,
        begin: tuple[int, ...] = (),
        first_target: int = 1,
    ) -> None:
        self.decoder = decoder
        self.targets = CountedTargets(windows_NL, batch_size, begin=begin, first=first_target)
        self.running = 0
        on_gpu = decoder.device.type == "cuda"
        with pinning():
            windows_NL = windows_NL.pin_memory() if on_gpu else windows_NL
        self.batches: list[Tensor] = list(torch.split(windows_NL, batch_size))
        self.hidden_states = HiddenStates()
        self._store = store or HiddenStateStore()
        self.calls: list[list[LayerCall]] = []
        shared = SharedValues()
        for ids_BL in self.batches:
            hidden_BLD, calls = self._record(ids_BL)
            if not self.calls:
                self.hidden_states = self._store.allocate(hidden_BLD, len(windows_NL))
            self.hidden_states.append(hidden_BLD)
            self.calls.append(shared.share(calls))
        if on_gpu:
            torch.cuda.current_stream(decoder.device).synchronize()  # other devices may use arguments in host memory

    @torch.no_grad()
    def restart(self) -> None:
        """Set the hidden states back to those before the first layer."""
        for batch, ids_BL in enumerate(self.batches):
            self.hidden_states[batch] = self._record(ids_BL)[0]

    def _record(self, ids_BL: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Return the hidden states before the first layer, and the arguments of every layer."""
        decoder = self.decoder
        hidden_BLD, calls = record_calls(
            decoder.skeleton,
            decoder.layers,
            inputs=decoder.model_inputs(ids_BL),
            run_layer=self._run_layer,
            items_returned=decoder.items_returned,
        )
        return hidden_BLD.to(decoder.device_of(0)), calls

    def _run_layer(self, index: int, received: ReceivedCall) -> Any:
        recorder = self.decoder.layers[index].__dict__.pop("forward")  # this once the layer's own forward runs
        try:
            with self.decoder.layer(index) as layer:
                return received.call.returned(layer, received.hidden_BLD.to(self.decoder.device_of(index)))
        finally:
            self.decoder.layers[index].forward = recorder

    @torch.no_grad()
    def outputs(self, index: int, layer: nn.Module) -> Iterator[LayerOutput]:
        """Yield the hidden states before and after one layer, batch by batch.

        ``hidden_states`` are not changed: ``advance`` sets them. Raises NumericalError after the last batch if there
        was NaN or infinity in any.
        """
        finite = FiniteOutputs(index)
        for batch in range(len(self.batches)):
            hidden_BLD = self.hidden_states.at(batch, self.decoder.device_of(index))
            output_BLD = self.output(batch, index, layer=layer, hidden_BLD=hidden_BLD)
            finite.add(output_BLD)
            yield LayerOutput(batch, hidden_BLD, output_BLD)
        finite.require()

    @torch.no_grad()
    def output(self, batch: int, index: int, *, layer: nn.Module, hidden_BLD: Tensor | None = None) -> Tensor:
        """Return the hidden states [B, L, D] of one batch after a layer, which are not checked (``FiniteOutputs``).

        ``hidden_BLD``: those before it, by default from ``hidden_states``.
        """
        if hidden_BLD is None:
            hidden_BLD = self.hidden_states.at(batch, self.decoder.device_of(index))
        self.running = batch
        return self.calls[batch][index].run(layer, hidden_BLD)

    def advance(self, batch: int, output_BLD: Tensor) -> None:
        """Set the hidden states of a batch before the next layer."""
        self.hidden_states[batch] = output_BLD

    def release(self) -> None:
        """Drop the hidden states and the arguments of the layers: nothing can be computed any more."""
        self.hidden_states = HiddenStates()
        self.calls = []

    def on(self, hidden_states: HiddenStates) -> LayerwiseForward:
        """Return a forward pass through the same decoder that advances other hidden states of the same windows."""
        other = copy(self)
        other.hidden_states = hidden_states
        return other

    def copy(self, tokens: slice = slice(None)) -> HiddenStates:
        """Copy the current hidden states, or only these tokens of each window, into a new buffer."""
        device = self.hidden_states.device
        copied = HiddenStates()
        for batch in range(len(self.batches)):
            hidden_BLD = self.hidden_states.at(batch, device)
            some_BLD = hidden_BLD[:, tokens]  # a view, which would hold the whole batch
            if not batch:
                copied = self.allocate(some_BLD)
            copied.append(hidden_BLD if some_BLD.shape == hidden_BLD.shape else some_BLD.clone())
        return copied

    def allocate(self, first_BLX: Tensor) -> HiddenStates:
        """Return an empty buffer for values of every batch, each window shaped like those of ``first_BLX``."""
        return self._store.allocate(first_BLX, sum(map(len, self.batches)))

    def append(self, buffers: dict[str, HiddenStates], name: str, *, value_BLX: Tensor) -> None:
        """Append one batch's values to the buffer of this name, which is allocated with the first batch."""
        if name not in buffers:
            buffers[name] = self.allocate(value_BLX)
        buffers[name].append(value_BLX)

    def pass_through(self, index: int, layer: nn.Module) -> None:
        """Run every batch through a layer and advance."""
        for batch, _, output_BLD in self.outputs(index, layer):
            self.advance(batch, output_BLD)

    def pass_and_keep(self, index: int, layer: nn.Module, *, projection: nn.Module) -> HiddenStates:
        """Run every batch through a layer and advance; return the outputs [B, L, X] of one of its projections."""
        seen: list[Tensor] = []
        kept = HiddenStates()
        with outputs_of(projection, seen.append):
            for batch, hidden_BLD, output_BLD in self.outputs(index, layer):
                written_BLX = seen.pop().view(*hidden_BLD.shape[:2], -1)
                if not batch:
                    kept = self.allocate(written_BLX)
                kept.append(written_BLX)
                self.advance(batch, output_BLD)
        return kept

    def token_ids(self, batch: int) -> Tensor:
        """Return the tokens [B, L] of a batch on the device of the embeddings and the logits, without a wait for it.

        In place of references to images they have the placeholder token.
        """
        ids_BL, images = self.batches[batch], self.decoder.images
        plain_BL = ids_BL if images is None else images.plain(ids_BL)
        return plain_BL.to(self.decoder.device, non_blocking=True)

    @torch.no_grad()
    def logits(self, batch: int) -> Tensor:
        """Return the logits [B, L, V] of a batch whose hidden states are those after the last layer."""
        return self.logits_of(self.token_ids(batch), self.hidden_states.at(batch, self.decoder.device))

    def logits_of(self, ids_BL: Tensor, hidden_BLD: Tensor, *, positions_P: Tensor | None = None) -> Tensor:
        """Return the logits [B, L, V] for hidden states after the last layer, with gradients if those are enabled.

        ``positions_P``: only those at these positions, [B, P, V]; the model must take them (``takes_positions``).
        """
        decoder = self.decoder
        return run_tail(
            decoder.skeleton,
            decoder.layers,
            ids_BL=ids_BL.to(decoder.device, non_blocking=True),
            hidden_BLD=hidden_BLD.to(decoder.device),
            items_returned=decoder.items_returned,
            positions_P=positions_P,
        )


def require_same_calls(dense: LayerwiseForward, pruned: LayerwiseForward, *, layers: Sequence[int]) -> None:
    """Raise ModelError unless each kept layer gets the same arguments (masks, rotary embeddings) in both models."""
    known: dict[tuple[int, int], bool] = {}
    for dense_calls, calls in zip(dense.calls, pruned.calls, strict=True):
        for new, old in enumerate(layers):
            before, now = dense_calls[old], calls[new]
            if not same_value((before.args, before.kwargs), (now.args, now.kwargs), known=known):
                moved = f"become layer {new}" if old != new else "keep its index"
                raise ModelError(
                    f"layer {old} would {moved} and be called with other arguments there (a mask or positions); the "
                    "model's config cannot express this cut"
                )
