"""One layer run in stages, so that each projection is calibrated on inputs that pruned earlier projections produce.

A probe run finds the order in which the layer calls its projections, and which of them have the same input. Each stage
then runs the layer, for all batches, only up to its own projections. Modules whose output is already final are replaced
by their cached output: a module that ends with a projection (attention, an MLP) is not run again once that projection
is done. The probe checks on the first batch that this replacement changes nothing.

Shapes: B batch, L sequence length, D hidden size, I inputs of a projection, X any features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.anatomy.hooks import inputs_of, outputs_of
from llmprune.common.errors import ModelError
from llmprune.layerwise.finite_outputs import FiniteOutputs
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.hooks import CachedOutput, return_cached, zero_output


@dataclass(frozen=True)
class Owner:
    """Module whose last operation is a projection, so that it returns the projection's output.

    ``items``: number of values that it returns, the output being the first; 0 for the tensor alone.
    """

    path: str
    items: int


@dataclass(frozen=True)
class Order:
    """Projections of a layer in the order of their calls, grouped by the input that they share.

    ``owners``: by projection, its owner, if a cached output can replace that.
    """

    groups: tuple[tuple[str, ...], ...]
    owners: dict[str, Owner]

    def before(self, projection: str, tensors: Sequence[str]) -> dict[str, int]:
        """Find the owners called before a projection that hold neither it nor any of these tensors.

        Returns the number of values that each returns, by path; owners within other owners are left out.
        """
        names = [name for group in self.groups for name in group]
        earlier = names[: names.index(projection)] if projection in names else []
        found = {owner.path: owner.items for owner in map(self.owners.get, earlier) if owner is not None}
        return {
            path: items
            for path, items in found.items()
            if not any(name.startswith(f"{path}.") for name in (projection, *tensors))
            and not any(path.startswith(f"{outer}.") for outer in found)
        }


@dataclass(frozen=True)
class ProjectionInput:
    """Input [B, L, I] of a projection for one batch.

    ``output_BLD``: the layer's output if the projection returned zeros, where that was asked for.
    """

    batch: int
    input_BLI: Tensor
    output_BLD: Tensor


class StagedLayer:
    """A layer with its weights, on the hidden states before it."""

    def __init__(self, forward: LayerwiseForward, index: int, *, layer: nn.Module, order: Order) -> None:
        self.forward, self.index, self.layer, self.order = forward, index, layer, order
        self._inputs: dict[str, HiddenStates] = {}
        self._outputs: dict[str, HiddenStates] = {}
        self._orders: dict[str, Tensor] = {}  # of the kept inputs of a projection, where the layer changed it

    def inputs(self, name: str, keep: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, input [B, L, I] of a projection); neither it nor later modules are run.

        ``keep`` the inputs for ``finish``. Raises ModelError if the layer does not call the projection.
        """
        for batch in range(len(self.forward.batches)):
            seen: list[Tensor] = []
            with suppress(_ReachedError), inputs_of(self.layer.get_submodule(name), partial(_stop, seen)):
                self._run(batch)
            if not seen:
                raise ModelError(
                    f"layer {self.index} does not call {name}, which layers of its kind do; "
                    "leave it out with sparsity.skip, or set refit: false"
                )
            yield batch, self._keep(name, batch, input_BLI=seen.pop(), keep=keep)

    def without(self, name: str, keep: bool = False) -> Iterator[ProjectionInput]:
        """Yield, batch by batch, the input of a projection and the layer's output if the projection returned zeros.

        Raises NumericalError after the last batch if there was NaN or infinity in any output.
        """
        finite = FiniteOutputs(self.index)
        for batch in range(len(self.forward.batches)):
            seen: list[Tensor] = []
            module = self.layer.get_submodule(name)
            with inputs_of(module, seen.append), zero_output([module]):
                output_BLD = self._run(batch)
            finite.add(output_BLD)
            yield ProjectionInput(batch, self._keep(name, batch, input_BLI=seen.pop(), keep=keep), output_BLD)
        finite.require()

    def finish(self, name: str) -> None:
        """Compute a projection with its final weights, so that its owner need not run again."""
        inputs = self.take_inputs(name)
        if inputs is None:
            return
        module, order_I = self.layer.get_submodule(name), self._orders.pop(name, None)
        for batch in range(len(inputs)):
            input_BLI = inputs.at(batch, self.forward.decoder.device_of(self.index))
            output_BLD = module(input_BLI if order_I is None else input_BLI[..., order_I])
            self.forward.append(self._outputs, self.order.owners[name].path, value_BLX=output_BLD)

    def permute_inputs(self, name: str, order_I: Tensor, *, sources: Collection[str]) -> None:
        """Note that the layer now computes the inputs of a projection in another order.

        ``sources``: modules that compute them; a cached output of one is computed again.
        """
        self._orders[name] = order_I
        for projection, owner in self.order.owners.items():
            if projection in sources:
                self._outputs.pop(owner.path, None)

    def take_inputs(self, name: str) -> HiddenStates | None:
        """Return the kept inputs of a projection, which ``finish`` then has no more; None where none were kept."""
        return self._inputs.pop(name, None)

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, hidden states [B, L, D] after the layer).

        Raises NumericalError after the last batch if there was NaN or infinity in any.
        """
        finite = FiniteOutputs(self.index)
        for batch in range(len(self.forward.batches)):
            output_BLD = self._run(batch)
            finite.add(output_BLD)
            yield batch, output_BLD
        finite.require()

    def _run(self, batch: int) -> Tensor:
        items = {owner.path: owner.items for owner in self.order.owners.values()}
        device = self.forward.decoder.device_of(self.index)
        cached = {path: CachedOutput(outputs.at(batch, device), items[path]) for path, outputs in self._outputs.items()}
        with return_cached(self.layer, cached):
            return self.forward.output(batch, self.index, layer=self.layer)

    def _keep(self, name: str, batch: int, *, input_BLI: Tensor, keep: bool) -> Tensor:
        batched = input_BLI.ndim == 3 and len(input_BLI) == len(self.forward.batches[batch])
        if keep and batched and name in self.order.owners:
            self.forward.append(self._inputs, name, value_BLX=input_BLI)
        return input_BLI


def probe(forward: LayerwiseForward, index: int, *, layer: nn.Module, names: Sequence[str]) -> Order:
    """Run the layer on the first batch to find the order of the named projections.

    Projections that are not called exactly once are in no group.
    """
    seen = _Probe()
    with ExitStack() as hooks:
        for path, module in layer.named_modules():
            if path in names:
                hooks.enter_context(inputs_of(module, partial(seen.add_input, path)))
                hooks.enter_context(outputs_of(module, partial(seen.outputs.__setitem__, path)))
            elif path:
                hooks.enter_context(outputs_of(module, partial(seen.add_return, path)))
        output_BLD = forward.output(0, index, layer=layer)
    finite = FiniteOutputs(index)
    finite.add(output_BLD)
    finite.require()

    def is_replaceable(owner: Owner) -> bool:
        output_BLX = seen.returned[owner.path]
        if output_BLX.ndim != 3 or output_BLX.shape[:2] != output_BLD.shape[:2]:
            return False  # computed for some of the tokens, and for others in each batch
        try:
            with return_cached(layer, {owner.path: CachedOutput(output_BLX, owner.items)}):
                return torch.equal(forward.output(0, index, layer=layer), output_BLD)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model does with None: it needs the other values, such as a router's
            return False

    replaceable = {name: owner for name, owner in seen.owners.items() if is_replaceable(owner)}
    return Order(seen.groups(), replaceable)


@dataclass
class _Probe:
    """Calls seen in one run of a layer: inputs and outputs of projections, and the modules that return the latter."""

    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, Owner] = field(default_factory=dict)
    returned: dict[str, Tensor] = field(default_factory=dict)  # by the owner's path

    def add_input(self, projection: str, value: Tensor) -> None:
        """Note a call of a projection."""
        self.inputs.append((projection, value))

    def add_return(self, path: str, value: Any) -> None:
        """Note the owner of a projection: the outermost module that returns the projection's output."""
        first = value[0] if isinstance(value, tuple) and value else value
        for name, output in self.outputs.items():
            if first is output and name.startswith(f"{path}."):
                self.owners[name] = Owner(path, len(value) if isinstance(value, tuple) else 0)
                self.returned[path] = output

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Group projections that are called once by their input: the same memory, unchanged in between."""
        called = [name for name, _ in self.inputs]
        groups: dict[Any, list[str]] = {}
        for name, value in self.inputs:
            if called.count(name) == 1:
                groups.setdefault((value.data_ptr(), value.numel(), value._version), []).append(name)
        return tuple(map(tuple, groups.values()))


class _ReachedError(Exception):
    """The projection of this stage is about to be called."""


def _stop(seen: list[Tensor], value: Tensor) -> None:
    seen.append(value)
    raise _ReachedError
