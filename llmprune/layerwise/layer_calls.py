"""Arguments that a model's own forward passes to each decoder layer: masks, rotary embeddings and others.

The model's own code runs once, with the forward of every layer replaced by a recorder that notes its arguments and
returns the hidden states unchanged. So arguments are recorded without knowledge of the model family.

Shapes: B batch, L sequence length, P some positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import text_config
from llmprune.common.errors import ModelError


class DeviceCopies:
    """Tensors on the devices that need them. Tensors given to ``keep`` are copied to each device once."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # by id
        self._copies: dict[tuple[int, torch.device], Tensor] = {}

    def keep(self, tensor: Tensor) -> None:
        """Copy a tensor to each device once: it is used again and again."""
        self._kept[id(tensor)] = tensor

    def on(self, value: Any, device: torch.device) -> Any:
        """Return a value with all tensors in it on a device."""
        return recursively_apply(self._tensor_on, value, device)

    def _tensor_on(self, tensor: Tensor, device: torch.device) -> Tensor:
        if tensor.device == device:
            return tensor
        if id(tensor) not in self._kept:
            return tensor.to(device, non_blocking=device.type == "cuda")
        key = (id(tensor), device)
        if key not in self._copies:
            self._copies[key] = tensor.to(device)
        return self._copies[key]


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one layer for one batch, without the hidden states. ``copies``: of tensors that calls share."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    copies: DeviceCopies = field(default_factory=DeviceCopies)

    def returned(self, layer: nn.Module, hidden_BLD: Tensor) -> Any:
        """Run the layer and return everything that it returns."""
        args, kwargs = self.copies.on((self.args, self.kwargs), hidden_BLD.device)
        return layer(hidden_BLD, *args, **kwargs)

    def run(self, layer: nn.Module, hidden_BLD: Tensor) -> Tensor:
        """Run the layer and return the hidden states after it [B, L, D]."""
        output = self.returned(layer, hidden_BLD)
        return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class ReceivedCall:
    """Arguments of one layer for one batch: the hidden states before it [B, L, D], and the others."""

    hidden_BLD: Tensor
    call: LayerCall

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReceivedCall:
        """Take the hidden states, which are the first argument or the one of that name, out of the arguments."""
        if args:
            return cls(args[0], LayerCall(args[1:], kwargs))
        rest = dict(kwargs)
        return cls(rest.pop("hidden_states"), LayerCall((), rest))


def same_value(first: Any, second: Any, *, known: dict[tuple[int, int], bool]) -> bool:
    """Check that two arguments are equal: tensors, numbers and strings by value, also in lists, tuples and dicts.

    Of any other objects only the types are compared. ``known``: results by the ids of two tensors; new ones are added.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        key = (id(first), id(second))
        if key not in known:
            known[key] = first.shape == second.shape and are_equal(first, second)
        return known[key]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(
            same_value(one, other, known=known) for one, other in zip(first, second, strict=True)
        )
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_value(first[key], second[key], known=known) for key in first)
    if isinstance(first, bool | int | float | str):
        return bool(first == second)
    return type(first) is type(second)


class _AllCalledError(Exception):
    """Every layer was called: ends the forward pass that records the calls."""


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    *,
    inputs: Mapping[str, Tensor],
    run_layer: Callable[[int, ReceivedCall], Any],
    items_returned: dict[type, int],
) -> tuple[Tensor, list[LayerCall]]:
    """Return the hidden states before the first layer [B, L, D] and the arguments of every layer.

    ``inputs``: arguments of the model's forward for the batch, at least its token ids [B, L].
    ``run_layer(index, received)`` runs a real layer, once for every class of layer, to find how many values it
    returns; ``items_returned`` gets that number, 0 for a tensor alone. Raises ModelError for a model whose layers are
    not simply called one after the other on the same hidden states.
    """
    calls: list[LayerCall] = []
    hiddens: list[Tensor] = []
    extras: dict[type, tuple[Any, ...]] = {}  # by class of layer: values returned after the hidden states
    extra_ids: set[int] = set()  # ids of tensors in ``extras`` that were not arguments of the layer

    def record(index: int, received: ReceivedCall) -> Any:
        hidden_BLD, args, kwargs = received.hidden_BLD, received.call.args, received.call.kwargs
        if index != len(calls) or (hiddens and not are_equal(hiddens[0], hidden_BLD)):
            raise _not_layerwise(model, "does something between its layers, or runs them out of order", index=index)
        if hidden_BLD.shape[-1] != text_config(model.config).hidden_size:
            raise _not_layerwise(model, "passes on several streams of hidden states side by side", index=index)
        if not extra_ids.isdisjoint(map(id, tensors_in((args, kwargs)))):
            raise _not_layerwise(model, "hands more than hidden states from layer to layer", index=index)
        hiddens.append(hidden_BLD)
        calls.append(LayerCall(args, kwargs))
        kind = type(layers[index])
        if kind not in items_returned:
            returned = run_layer(index, ReceivedCall(hidden_BLD, calls[-1]))
            extras[kind] = () if isinstance(returned, Tensor) else tuple(returned[1:])
            items_returned[kind] = 0 if isinstance(returned, Tensor) else len(returned)
            given = tensors_in((calls[-1].args, calls[-1].kwargs))
            extra_ids.update({*map(id, tensors_in(extras[kind]))} - {*map(id, given)})
        if index == len(layers) - 1:
            raise _AllCalledError
        return _as_returned(hidden_BLD, items_returned[kind], extras=extras.get(kind, ()))

    try:
        with _replaced_forwards(layers, record):
            model(**inputs, use_cache=False)
    except _AllCalledError:
        return hiddens[0], calls
    raise ModelError(f"{type(model).__name__} returned without running its {len(layers)} layers")


def run_tail(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    *,
    ids_BL: Tensor,
    hidden_BLD: Tensor,
    items_returned: dict[type, int],
    positions_P: Tensor | None = None,
) -> Tensor:
    """Return the logits [B, L, V] that the model's own code computes from the last layer's hidden states.

    ``positions_P``: only those at these positions [B, P, V], of a model that takes them (``takes_positions``).
    """
    kept = {} if positions_P is None else {"logits_to_keep": positions_P.to(ids_BL.device)}

    def pass_on(index: int, received: ReceivedCall) -> Any:
        passed_BLD = hidden_BLD if index == len(layers) - 1 else received.hidden_BLD
        return _as_returned(passed_BLD, items_returned[type(layers[index])])

    with _replaced_forwards(layers, pass_on):
        logits_BLV: Tensor = model(input_ids=ids_BL, use_cache=False, **kept).logits
    return logits_BLV


def takes_positions(model: PreTrainedModel) -> bool:
    """Check whether the model's forward computes logits at given positions only."""
    return "logits_to_keep" in signature(type(model).forward).parameters


@contextmanager
def _replaced_forwards(layers: nn.ModuleList, forward: Callable[[int, ReceivedCall], Any]) -> Iterator[None]:
    def make(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(index, ReceivedCall.split(args, kwargs))

    try:
        for index, layer in enumerate(layers):
            layer.forward = make(index)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _as_returned(hidden_BLD: Tensor, items: int, *, extras: tuple[Any, ...] = ()) -> Any:
    """Return hidden states in the form in which a layer returns them: alone, or first of ``items`` values."""
    if not items:
        return hidden_BLD
    return (hidden_BLD, *(extras or [None] * (max(items, 2) - 1)))


def _not_layerwise(model: PreTrainedModel, what: str, *, index: int) -> ModelError:
    return ModelError(f"{type(model).__name__} {what} (at layer {index}); such a model cannot be run layer by layer")


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a value, also in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Check that two tensors have the same shape and values; the host waits for their device."""
    return first is second or torch.equal(first, second)
