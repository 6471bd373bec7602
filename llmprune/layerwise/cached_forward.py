"""A layer run several times on the same hidden states, uncut and cut: modules before what changes are run once.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmprune.layerwise.forward import LayerwiseForward, outputs_of
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.layerwise.staged_layer import replaced


class Reruns:
    """Runs of one layer in a walk whose streams stay before it.

    ``same``: modules that put out the same in every run, by how many values they return (0: a tensor alone). The first
    run of a batch notes their outputs, later ones are given them.
    """

    def __init__(self, walk: LayerwiseForward, same: dict[str, int]) -> None:
        self.walk, self.same = walk, same
        self._noted: dict[str, HiddenStates] = {}

    def outputs(self, index: int, layer: nn.Module) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (batch number, hidden states before, hidden states after the layer), both [B, L, D]."""
        device = self.walk.decoder.device_of(index)
        for batch, stream_BLD in enumerate(self.walk.streams):
            hidden_BLD = stream_BLD.to(device)
            known = {path: noted for path, noted in self._noted.items() if batch < len(noted)}
            with ExitStack() as hooks:
                given = {path: (noted[batch].to(device), self.same[path]) for path, noted in known.items()}
                hooks.enter_context(replaced(layer, given))
                for path in self.same.keys() - known.keys():
                    hooks.enter_context(outputs_of(layer.get_submodule(path), partial(self._note, path)))
                output_BLD = self.walk.output(batch, index, layer=layer, hidden_BLD=hidden_BLD)
            yield batch, hidden_BLD, output_BLD

    def _note(self, path: str, value: Any) -> None:
        value_BLX: Tensor = value[0] if self.same[path] else value
        if path not in self._noted:
            self._noted[path] = self.walk.room(value_BLX)
        self._noted[path].append(value_BLX)
