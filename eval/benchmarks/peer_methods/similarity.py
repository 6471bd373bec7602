"""Cosine similarity of the residual stream before and behind spans of layers, which depth methods choose by.

Shapes in names: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peer_methods.base import Trace


class SpanDistances:
    """Mean distance over tokens of the stream before layer i and before layer i + span, for every i.

    ``distance``: of a tensor of cosine similarities.
    """

    def __init__(self, spans: Sequence[int], distance: Callable[[Tensor], Tensor]) -> None:
        """``spans``: numbers of layers."""
        self._sums: dict[int, dict[int, float]] = {span: {} for span in spans}
        self._distance = distance
        self._tokens = 0

    def add(self, trace: Trace) -> None:
        """Add a batch."""
        stream = [hidden_BLD / hidden_BLD.norm(dim=-1, keepdim=True) for hidden_BLD in trace.hidden_BLD]
        for span, sums in self._sums.items():
            for start in range(len(stream) - span):
                cosines_BL = (stream[start] * stream[start + span]).sum(-1).clamp(-1, 1)
                sums[start] = sums.get(start, 0.0) + self._distance(cosines_BL).double().sum().item()
        self._tokens += stream[0].shape[0] * stream[0].shape[1]

    def of_span(self, span: int) -> dict[int, float]:
        """Return the mean distance by first layer."""
        return {start: total / self._tokens for start, total in self._sums[span].items()}


def cosine_distance(cosines: Tensor) -> Tensor:
    """Return 1 - cosine."""
    return 1 - cosines


def angular_distance(cosines: Tensor) -> Tensor:
    """Return the angle in units of pi."""
    return torch.arccos(cosines) / torch.pi


def nearest_block(distances: dict[int, float], starts: Sequence[int]) -> int:
    """Return the first layer, among some, of the block with the least distance."""
    return min(starts, key=distances.__getitem__)
