"""One layer run several times on the same hidden states, uncut and cut: modules before the change run once.

Shapes: B batch, L sequence length, D hidden size, X any features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from llmprune.anatomy.hooks import outputs_of
from llmprune.layerwise.finite_outputs import FiniteOutputs
from llmprune.layerwise.forward import LayerOutput, LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.layerwise.hooks import CachedOutput, return_cached


class CachedForward:
    """Runs of one layer on hidden states that are not advanced.

    ``unchanged``: modules with the same output in every run, by path, and the number of values that each returns (0 for
    a tensor alone). The first run of a batch stores their outputs, later runs reuse them.
    """

    def __init__(self, forward: LayerwiseForward, unchanged: dict[str, int]) -> None:
        self.forward, self.unchanged = forward, unchanged
        self._stored: dict[str, HiddenStates] = {}

    def outputs(self, index: int, layer: nn.Module) -> Iterator[LayerOutput]:
        """Yield the hidden states before and after the layer, batch by batch.

        Raises NumericalError after the last batch if there was NaN or infinity in any.
        """
        device = self.forward.decoder.device_of(index)
        finite = FiniteOutputs(index)
        for batch in range(len(self.forward.batches)):
            hidden_BLD = self.forward.hidden_states.at(batch, device)
            cached = {
                path: CachedOutput(stored.at(batch, device), self.unchanged[path])
                for path, stored in self._stored.items()
                if batch < len(stored)
            }
            with ExitStack() as hooks:
                hooks.enter_context(return_cached(layer, cached))
                for path in self.unchanged.keys() - cached.keys():
                    hooks.enter_context(outputs_of(layer.get_submodule(path), partial(self._store, path)))
                output_BLD = self.forward.output(batch, index, layer=layer, hidden_BLD=hidden_BLD)
            finite.add(output_BLD)
            yield LayerOutput(batch, hidden_BLD, output_BLD)
        finite.require()

    def _store(self, path: str, value: Any) -> None:
        self.forward.append(self._stored, path, value_BLX=value[0] if self.unchanged[path] else value)
