"""Taps: what a model's own forward hands to each decoder layer.

The model runs its own code once with every layer replaced by a tap that notes
its arguments and passes the hidden states through. Masks, rotary embeddings and
whatever else a family computes are so recorded without knowing the family.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.meta_model import text_config
from llmprune.common.errors import ModelError


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer for one batch, hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def returned(self, layer: nn.Module, hidden_BLD: Tensor) -> Any:
        """All that the layer returns."""
        args, kwargs = send_to_device((self.args, self.kwargs), hidden_BLD.device)
        return layer(hidden_BLD, *args, **kwargs)

    def run(self, layer: nn.Module, hidden_BLD: Tensor) -> Tensor:
        """Hidden states after the layer [B, L, D]."""
        output = self.returned(layer, hidden_BLD)
        return output if isinstance(output, Tensor) else output[0]


class SharedValues:
    """Keeps one copy of equal tensors: masks and rotary embeddings repeat over layers and batches.

    Tensors of the first batch stay where they are. A later batch's own tensors (made of its tokens, as Gemma 4's
    inputs of each layer) go to the CPU's memory, so that no number of batches fills a GPU.
    """

    def __init__(self) -> None:
        self._first: list[tuple[Tensor, Tensor]] = []  # of the first batch: (as the model made it, as it is kept)
        self._own: list[tuple[Tensor, Tensor]] | None = None  # of the batch that is being recorded, if a later one

    def start_batch(self) -> None:
        """Begin to record the next batch."""
        self._own = [] if self._first else None

    def share(self, value: Any) -> Any:
        """The value, with every tensor in it replaced by an equal one that is kept already."""
        if isinstance(value, Tensor):
            own = self._first if self._own is None else self._own
            for made, kept in (*self._first, *(self._own or ())):
                if made is value or (made.shape == value.shape and made.dtype == value.dtype and _same(made, value)):
                    return kept
            own.append((value, value if own is self._first else value.cpu()))
            return own[-1][1]
        if type(value) in (tuple, list):
            return type(value)(self.share(item) for item in value)
        if type(value) is dict:
            return {key: self.share(item) for key, item in value.items()}
        return value


def same_value(first: Any, second: Any) -> bool:
    """Whether two arguments are equal, tensors in lists, tuples and mappings by their values.

    Of objects that are none of these only the types are compared.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and _same(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_value, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_value(first[key], second[key]) for key in first)
    if isinstance(first, bool | int | float | str):
        return bool(first == second)
    return type(first) is type(second)


class _Recorded(Exception):  # no error: it ends a forward pass that is only being recorded
    pass


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    *,
    ids_BL: Tensor,
    shared: SharedValues,
    run_layer: Callable[[int, LayerCall, Tensor], Any],
    returns_tuple: dict[type, int],
) -> tuple[Tensor, list[LayerCall]]:
    """Hidden states before the first layer [B, L, D], and the call of every layer.

    ``run_layer`` runs a real layer, once for every class of layer, to learn whether it
    returns a tensor or a tuple; ``returns_tuple`` keeps of how many items, 0 for a tensor.
    """
    calls: list[LayerCall] = []
    hiddens: list[Tensor] = []
    besides: dict[type, tuple[Any, ...]] = {}  # what a layer of a class returned with its hidden states
    handed: set[int] = set()  # the tensors in that by their ids, those left out that the layer was called with

    def tap(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: PLR0917 - a callback
        hidden_BLD, args, kwargs = _split_hidden(args, kwargs)
        if index != len(calls) or (hiddens and not _same(hiddens[0], hidden_BLD)):
            raise _unwalkable(model, "does something between its layers, or runs them out of order", index=index)
        if hidden_BLD.shape[-1] != text_config(model.config).hidden_size:
            raise _unwalkable(model, "passes on several streams of hidden states side by side", index=index)
        if not handed.isdisjoint(map(id, _tensors((args, kwargs)))):
            raise _unwalkable(model, "hands more than hidden states from layer to layer", index=index)
        hiddens.append(hidden_BLD)
        calls.append(LayerCall(shared.share(args), shared.share(kwargs)))
        kind = type(layers[index])
        if kind not in returns_tuple:
            returned = run_layer(index, calls[-1], hidden_BLD)
            besides[kind] = () if isinstance(returned, Tensor) else tuple(returned[1:])
            returns_tuple[kind] = 0 if isinstance(returned, Tensor) else len(returned)
            given = _tensors((calls[-1].args, calls[-1].kwargs))
            handed.update({*map(id, _tensors(besides[kind]))} - {*map(id, given)})
        if index == len(layers) - 1:
            raise _Recorded
        return _as_returned(hidden_BLD, returns_tuple[kind], besides=besides.get(kind, ()))

    try:
        with _tapped(layers, tap):
            model(input_ids=ids_BL, use_cache=False)
    except _Recorded:
        return hiddens[0], calls
    raise ModelError(f"{type(model).__name__} returned without running its {len(layers)} layers")


def run_tail(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    *,
    ids_BL: Tensor,
    hidden_BLD: Tensor,
    returns_tuple: dict[type, int],
) -> Tensor:
    """Logits [B, L, V] that the model's own code makes of the last layer's hidden states."""

    def tap(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: PLR0917 - a callback
        passed_BLD = hidden_BLD if index == len(layers) - 1 else _split_hidden(args, kwargs)[0]
        return _as_returned(passed_BLD, returns_tuple[type(layers[index])])

    with _tapped(layers, tap):
        logits_BLV: Tensor = model(input_ids=ids_BL, use_cache=False).logits
    return logits_BLV


@contextmanager
def _tapped(layers: nn.ModuleList, tap: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    def make(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: tap(index, args, kwargs)

    try:
        for index, layer in enumerate(layers):
            layer.forward = make(index)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _as_returned(hidden_BLD: Tensor, items: int, *, besides: tuple[Any, ...] = ()) -> Any:
    """Hidden states in the form in which a layer returns them: alone, or first of so many items."""
    if not items:
        return hidden_BLD
    return (hidden_BLD, *(besides or [None] * (max(items, 2) - 1)))


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _unwalkable(model: PreTrainedModel, what: str, *, index: int) -> ModelError:
    return ModelError(f"{type(model).__name__} {what} (at layer {index}); such a model cannot be walked layer by layer")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first, second)
