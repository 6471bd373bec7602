"""Scores of spans of consecutive layers, from the hidden states before the first and after the last of a span.

Shapes: N layers, B batch, L sequence length, D hidden size, S spans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.criteria.accumulators.base import LayerAccumulator
from llmprune.criteria.base import HiddenStateCriterion
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.score.source_parts import SourceParts


@dataclass(frozen=True)
class LayerSpan:
    """One span during the forward pass of its last layer.

    ``accumulators``: one a source. ``first``: hidden states of ``tokens`` before its first layer; None for a span of a
    single layer.
    """

    accumulators: tuple[LayerAccumulator, ...]
    parts: SourceParts
    tokens: slice
    first: HiddenStates | None

    def update(self, batch: int, hidden_BLD: Tensor, *, output_BLD: Tensor) -> None:
        """Add a batch: hidden states before and after the last layer."""
        first_BLD = hidden_BLD[:, self.tokens] if self.first is None else self.first.at(batch, output_BLD.device)
        for source, pair in self.parts.of(batch, first_BLD, output_BLD[:, self.tokens]):
            self.accumulators[source].update(*pair)

    def reducible_state(self) -> list[Tensor]:
        """Return the running sums themselves, which several processes add up in place."""
        return [tensor for accumulator in self.accumulators for tensor in accumulator.reducible_state()]


class LayerSpans:
    """Every span of ``length`` consecutive layers, each scored when the forward pass reaches its end."""

    def __init__(self, criterion: HiddenStateCriterion, remove: int, *, parts: SourceParts) -> None:
        self.criterion, self.length = criterion, criterion.horizon(remove)
        self.parts = parts
        self._first: deque[HiddenStates] = deque(maxlen=self.length)  # before each of the last layers
        self._scores: list[list[Tensor]] = [[] for _ in range(parts.scored)]

    def begin(self, device: torch.device) -> LayerSpan | None:
        """Return the span that ends with the next layer; None for the first layers. ``device``: that of the layer."""
        tokens, first = self.criterion.token_slice, None
        if self.length > 1:
            self._first.append(self.parts.forward.copy(tokens))
            if len(self._first) < self.length:
                return None
            first = self._first[0]
        accumulators = tuple(self.criterion.make_accumulator(device) for _ in range(self.parts.count))
        return LayerSpan(accumulators, self.parts, tokens, first)

    def end(self, span: LayerSpan) -> None:
        """Record the score of a span after all batches, from the sums of all processes."""
        for scores, accumulator in zip(self._scores, self.parts.merged(span.accumulators), strict=True):
            scores.append(accumulator.score().cpu())

    def by_source(self) -> list[Tensor]:
        """Return the scores of the spans by each source, float32 [S] each."""
        return [torch.stack(scores) for scores in self._scores]

    def of_layers(self, spans_S: Tensor, layers: int, *, starts: Sequence[int] | None = None) -> Tensor:
        """Return for each layer the best score of the spans that contain it, float32 [N].

        ``starts``: first layers of the spans that count; the others get the score of the worst span.
        """
        if starts is not None:
            counts_S = torch.zeros(len(spans_S), dtype=torch.bool).index_fill_(0, torch.tensor(starts), True)
            spans_S = spans_S.where(counts_S, spans_S.max())
        each = [spans_S[max(0, index - self.length + 1) : index + 1].min() for index in range(layers)]
        return torch.stack(each)
