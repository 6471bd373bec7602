"""Interface of a repair: a change of a kept layer's weights towards the dense model, made in one stage of pass 2."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from llmprune.prune.layer_work import LayerWork, Pass2Context


class Stage(Enum):
    """Point of a layer's work at which a repair is made.

    Before the gap the dense hidden states are those after the layer itself, afterwards those after its removed
    successors too.
    """

    BEFORE_GAP = "before the gap"
    AFTER_GAP = "after the gap"


class LayerRepair(Protocol):
    """A repair, one for all layers and runs: it has no state.

    A new repair is a file with a class like this and a line in ``registry``.
    """

    stage: Stage

    def apply(self, run: Pass2Context, work: LayerWork) -> None:
        """Repair ``work.weights`` and note the result in ``work.outcome``; do nothing where there is nothing to do."""
