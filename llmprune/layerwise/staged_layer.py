"""One layer in stages: its projections see the pruned stream one after the other, each when those before are done.

A probe run finds the order in which the layer calls its projections, and which of them get the same input. Then each
stage runs the layer, over all batches, only as far as its own projections. What is behind is not run again where it
need not be: a module that ends with a projection (attention, an MLP) is replaced, once that projection is done, by
its own output. Whether that changes nothing is tried on the first batch of each kind of layer.

Shapes: B batch, L sequence length, D hidden size, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.projections import outputs_of_projection
from llmprune.common.errors import ModelError
from llmprune.layerwise.forward import LayerwiseForward, inputs_of
from llmprune.layerwise.hidden_states import HiddenStates


@dataclass(frozen=True)
class Order:
    """Projections by the input that they share, as they are called; of each its owner: the module that it ends.

    ``owners``: the owner's name and how many values it returns (0: a tensor alone).
    """

    groups: tuple[tuple[str, ...], ...]
    owners: dict[str, tuple[str, int]]

    def before(self, projection: str, tensors: Sequence[str]) -> dict[str, int]:
        """Owners called before a projection, or with it, that hold none of these tensors; values by owner."""
        names = [name for group in self.groups for name in group]
        earlier = names[: names.index(projection)] if projection in names else []
        found = dict(self.owners[name] for name in earlier if name in self.owners)
        return {
            owner: values
            for owner, values in found.items()
            if not any(name.startswith(f"{owner}.") for name in (projection, *tensors))
            and not any(owner.startswith(f"{outer}.") for outer in found)
        }


class StagedLayer:
    """A layer with its weights, in a walk whose streams are before it."""

    def __init__(self, walk: LayerwiseForward, index: int, *, layer: nn.Module, order: Order) -> None:
        self.walk, self.index, self.layer, self.order = walk, index, layer, order
        self._inputs: dict[str, HiddenStates] = {}
        self._outputs: dict[str, HiddenStates] = {}

    def inputs(self, name: str, keep: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(batch number, input [B, L, I] of a projection), without running it. Kept ones serve ``finish``."""
        for batch in range(len(self.walk.batches)):
            seen: list[Tensor] = []
            with suppress(_ReachedError), inputs_of(self.layer.get_submodule(name), partial(_stop, seen)):
                self._run(batch)
            if not seen:
                raise ModelError(
                    f"layer {self.index} does not call {name}, which layers of its kind do; "
                    "leave it out with sparsity.skip, or set refit: false"
                )
            yield batch, self._keep(name, batch, input_BLI=seen.pop(), keep=keep)

    def without(self, name: str, keep: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch number, input [B, L, I] of a projection, the layer's output [B, L, D] if that wrote zeros)."""
        for batch in range(len(self.walk.batches)):
            seen: list[Tensor] = []
            module = self.layer.get_submodule(name)
            with inputs_of(module, seen.append), muted([module]):
                output_BLD = self._run(batch)
            yield batch, self._keep(name, batch, input_BLI=seen.pop(), keep=keep), output_BLD

    def finish(self, name: str) -> None:
        """The projection has its last weights: from now on its owner is not run again, where that is possible."""
        inputs = self._inputs.pop(name, None)
        if inputs is None:
            return
        module = self.layer.get_submodule(name)
        for input_BLI in inputs:
            output_BLD = module(input_BLI.to(self.walk.decoder.device_of(self.index)))
            self._add(self._outputs, self.order.owners[name][0], value_BLX=output_BLD)

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """(batch number, hidden states [B, L, D] after the layer)."""
        for batch in range(len(self.walk.batches)):
            yield batch, self._run(batch)

    def _run(self, batch: int) -> Tensor:
        sizes = dict(self.order.owners.values())
        device = self.walk.decoder.device_of(self.index)
        known = {owner: (outputs[batch].to(device), sizes[owner]) for owner, outputs in self._outputs.items()}
        with replaced(self.layer, known):
            return self.walk.output(batch, self.index, layer=self.layer)

    def _keep(self, name: str, batch: int, *, input_BLI: Tensor, keep: bool) -> Tensor:
        batched = input_BLI.ndim == 3 and len(input_BLI) == len(self.walk.batches[batch])
        if keep and batched and name in self.order.owners:
            self._add(self._inputs, name, value_BLX=input_BLI)
        return input_BLI

    def _add(self, kept: dict[str, HiddenStates], name: str, *, value_BLX: Tensor) -> None:
        """Keep what one more batch has; room is made once, for it may be a file."""
        if name not in kept:
            kept[name] = self.walk.room(value_BLX)
        kept[name].append(value_BLX)


def probe(walk: LayerwiseForward, index: int, *, layer: nn.Module, names: Sequence[str]) -> Order:
    """Run the first batch and see. Projections that are not called exactly once are in no group."""
    inputs: list[tuple[str, Tensor]] = []
    ended: dict[str, Tensor] = {}
    owners: dict[str, tuple[str, int]] = {}
    outputs: dict[str, Tensor] = {}

    def returns(path: str, value: Any) -> None:
        first = value[0] if isinstance(value, tuple) and value else value
        for name, output in ended.items():
            if first is output and name.startswith(f"{path}."):
                owners[name] = (path, len(value) if isinstance(value, tuple) else 0)
                outputs[path] = output

    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            if path in names:
                see = _noter(inputs, path)
                hooks.enter_context(inputs_of(module, see))
                hooks.callback(module.register_forward_hook(_ender(ended, path)).remove)
            elif path:
                hook = module.register_forward_hook(lambda _, __, value, path=path: returns(path, value))
                hooks.callback(hook.remove)
        output_BLD = walk.output(0, index, layer=layer)
    called = [name for name, _ in inputs]
    groups: dict[Any, list[str]] = {}
    for name, value in inputs:
        if called.count(name) == 1:
            groups.setdefault((value.data_ptr(), value.numel(), value._version), []).append(name)

    def replays(path: str, size: int) -> bool:
        if outputs[path].ndim != 3 or outputs[path].shape[:2] != output_BLD.shape[:2]:
            return False  # of some tokens only, which are others in each batch
        try:
            with replaced(layer, {path: (outputs[path], size)}):
                return torch.equal(walk.output(0, index, layer=layer), output_BLD)
        except Exception:  # whatever a model does with None: a router's other values are needed
            return False

    owners = {name: owner for name, owner in owners.items() if replays(*owner)}
    return Order(tuple(map(tuple, groups.values())), owners)


@contextmanager
def muted(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules write zeros while the context lasts, bias included; projections without computing."""
    with ExitStack() as undo:
        for module in modules:
            outputs = outputs_of_projection(module)
            if outputs is None:
                undo.callback(module.register_forward_hook(_zeros).remove)
            else:
                module.__dict__["forward"] = lambda value, outputs=outputs: value.new_zeros(*value.shape[:-1], outputs)
                undo.callback(module.__dict__.pop, "forward")
        yield


@contextmanager
def replaced(layer: nn.Module, known: dict[str, tuple[Tensor, int]]) -> Iterator[None]:
    """Modules return what is known of them while the context lasts, a tuple of so many values where not 0."""
    modules = [layer.get_submodule(path) for path in known]
    for module, (output, size) in zip(modules, known.values(), strict=True):
        value = (output, *[None] * (size - 1)) if size else output
        module.__dict__["forward"] = lambda *_, value=value, **__: value
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward")


class _ReachedError(Exception):
    """The stage's projection is about to be called."""


def _noter(calls: list[tuple[str, Tensor]], path: str) -> Callable[[Tensor], None]:
    return lambda value: calls.append((path, value))


def _ender(ended: dict[str, Tensor], path: str) -> Callable[..., None]:
    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        ended[path] = output

    return note


def _stop(seen: list[Tensor], value: Tensor) -> None:
    seen.append(value)
    raise _ReachedError


def _zeros(_: nn.Module, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
