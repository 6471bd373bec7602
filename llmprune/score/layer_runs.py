"""Scores of runs of neighbouring layers, from the hidden states before the first and after the last of a run.

Shapes: N layers, B batch, L sequence length, D hidden size, R runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.common.distributed import sum_over_processes
from llmprune.criteria.accumulators.base import LayerAccumulator
from llmprune.criteria.base import HiddenStateCriterion
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStates


@dataclass(frozen=True)
class LayerRun:
    """One run of layers during the forward pass of its last layer.

    ``first``: hidden states of ``tokens`` before its first layer; None for a run of a single layer.
    """

    accumulator: LayerAccumulator
    tokens: slice
    first: HiddenStates | None

    def update(self, batch: int, hidden_BLD: Tensor, *, output_BLD: Tensor) -> None:
        """Add a batch: hidden states before and after the last layer."""
        first_BLD = hidden_BLD[:, self.tokens] if self.first is None else self.first[batch].to(output_BLD.device)
        self.accumulator.update(first_BLD, output_BLD[:, self.tokens])


class LayerRuns:
    """Every run of ``span`` neighbouring layers, scored one after the other as the forward pass reaches its end."""

    def __init__(self, criterion: HiddenStateCriterion, remove: int, *, forward: LayerwiseForward) -> None:
        self.criterion, self.span, self.forward = criterion, criterion.horizon(remove), forward
        self._first: deque[HiddenStates] = deque(maxlen=self.span)  # before each of the last layers
        self._scores: list[Tensor] = []

    def begin(self, device: torch.device) -> LayerRun | None:
        """Return the run that ends with the next layer, which is computed on this device; None for the first layers."""
        tokens, first = self.criterion.token_slice, None
        if self.span > 1:
            self._first.append(self.forward.copy(tokens))
            if len(self._first) < self.span:
                return None
            first = self._first[0]
        return LayerRun(self.criterion.make_accumulator(device), tokens, first)

    def end(self, run: LayerRun) -> None:
        """Record the score of a run after all batches."""
        sum_over_processes(run.accumulator.reducible_state())
        self._scores.append(run.accumulator.score().cpu())

    def scores(self, layers: int, starts: Sequence[int] | None = None) -> Tensor:
        """Return for each layer the best score of the runs that contain it, float32 [N].

        ``starts``: first layers of the runs that count; the others get the score of the worst run.
        """
        runs_R = torch.stack(self._scores)
        if starts is not None:
            counts_R = torch.zeros(len(runs_R), dtype=torch.bool).index_fill_(0, torch.tensor(starts), True)
            runs_R = runs_R.where(counts_R, runs_R.max())
        each = [runs_R[max(0, index - self.span + 1) : index + 1].min() for index in range(layers)]
        return torch.stack(each)
