"""One layer run several times on the same hidden states, uncut and cut: what does not change is computed once.

Modules before the cut unit run once. The unit itself does not run again for the cut layer's final outputs where the
inputs of its output projection were kept: only that projection is computed.

Shapes: B batch, L sequence length, D hidden size, K inputs of the output projection, X any features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmprune.anatomy.hooks import outputs_of
from llmprune.layerwise.finite_outputs import FiniteOutputs
from llmprune.layerwise.forward import LayerOutput, LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.hooks import CachedOutput, return_cached
from llmprune.layerwise.staged_layer import Owner


class CachedForward:
    """Runs of one layer on hidden states that are not advanced.

    ``unchanged``: modules with the same output in every run, by path, and the number of values that each returns (0 for
    a tensor alone). The first run of a batch stores their outputs, later runs reuse them. ``last``: the module that
    ends with the unit's output projection; None where a cached output cannot replace it.
    """

    def __init__(self, forward: LayerwiseForward, unchanged: dict[str, int], *, last: Owner | None = None) -> None:
        self.forward, self.unchanged, self.last = forward, unchanged, last
        self._stored: dict[str, HiddenStates] = {}
        self._inputs: dict[str, HiddenStates] = {}

    def outputs(self, index: int, layer: nn.Module) -> Iterator[LayerOutput]:
        """Yield the hidden states before and after the layer, batch by batch.

        Raises NumericalError after the last batch if there was NaN or infinity in any.
        """
        yield from self._outputs(index, layer, projections=())

    def final_outputs(self, index: int, layer: nn.Module) -> Iterator[LayerOutput]:
        """Yield the same of the cut layer with its final weights, computed from kept inputs where there are any."""
        yield from self._outputs(index, layer, projections=tuple(self._inputs))

    def _outputs(self, index: int, layer: nn.Module, *, projections: Sequence[str]) -> Iterator[LayerOutput]:
        device = self.forward.decoder.device_of(index)
        finite = FiniteOutputs(index)
        for batch in range(len(self.forward.batches)):
            hidden_BLD = self.forward.hidden_states.at(batch, device)
            cached = {
                path: CachedOutput(stored.at(batch, device), self.unchanged[path])
                for path, stored in self._stored.items()
                if batch < len(stored)
            }
            for projection in projections:
                assert self.last is not None, "inputs are kept only with it"
                written_BLD = layer.get_submodule(projection)(self._inputs[projection].at(batch, device))
                cached[self.last.path] = CachedOutput(written_BLD, self.last.items)
            with ExitStack() as hooks:
                hooks.enter_context(return_cached(layer, cached))
                for path in self.unchanged.keys() - cached.keys():
                    hooks.enter_context(outputs_of(layer.get_submodule(path), partial(self._store, path)))
                output_BLD = self.forward.output(batch, index, layer=layer, hidden_BLD=hidden_BLD)
            finite.add(output_BLD)
            yield LayerOutput(batch, hidden_BLD, output_BLD)
        finite.require()

    def add_unchanged(self, path: str, projection: nn.Module, *, inputs: HiddenStates, index: int) -> None:
        """Store the outputs of an unchanged module, which its last projection computes from these inputs."""
        device = self.forward.decoder.device_of(index)
        for batch in range(len(inputs)):
            self.forward.append(self._stored, path, value_BLX=projection(inputs.at(batch, device)))

    def keep_input(self, projection: str, input_BLK: Tensor) -> None:
        """Keep the next batch's inputs of the cut unit's output projection for ``final_outputs``.

        Afterwards nothing of the layer may change but the weight of that projection.
        """
        if self.last is not None:
            self.forward.append(self._inputs, projection, value_BLX=input_BLK)

    def _store(self, path: str, value: Any) -> None:
        self.forward.append(self._stored, path, value_BLX=value[0] if self.unchanged[path] else value)
