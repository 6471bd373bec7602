"""Divergence and perplexity on held-out windows, source by source.

Shapes: N windows, L sequence length, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmprune.common.distributed import rank, sum_over_processes, world_size
from llmprune.recover.loss import Targets, distillation_loss
from llmprune.recover.teacher import StoredPredictions


class Measured(NamedTuple):
    """Divergence from the dense model in nats per token, and perplexity, by name of the source."""

    divergence: dict[str, float]
    perplexity: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean divergence over the sources, each of which counts alike."""
        return sum(self.divergence.values()) / len(self.divergence)


@dataclass(frozen=True)
class HeldOut:
    """Windows int64 [N, L] that judge the training, the dense model's predictions for them, and their sources.

    ``sources_N``: the index in ``names`` of each window's source; ``begin``: begin-of-text ids, whose prediction does
    not count.
    """

    predictions: StoredPredictions
    sources_N: Tensor
    names: Sequence[str]
    begin: tuple[int, ...] = ()

    @torch.no_grad()
    def measure(self, logits_of: Callable[[int], Tensor]) -> Measured:
        """Measure the windows. ``logits_of``: returns those of a window, by its number, [L, V].

        Processes share the windows; all return the same values.
        """
        count = len(self.sources_N)
        sums_S3 = torch.zeros(len(self.names), 3, dtype=torch.float64)
        for place in range(rank(), ceil(count / world_size()) * world_size(), world_size()):
            row = place % count  # with FSDP2 every process makes as many forward passes
            sums_3 = self._of_window(row, logits_of(row))
            if row == place:
                sums_S3[self.sources_N[row]] += sums_3
        sum_over_processes([sums_S3])
        means = {name: (sums_S3[index, :2] / sums_S3[index, 2]).tolist() for index, name in enumerate(self.names)}
        return Measured(
            {name: divergence for name, (divergence, _) in means.items()},
            {name: _exp(loss) for name, (_, loss) in means.items()},
        )

    def dense_perplexity(self) -> dict[str, float]:
        """Return the dense model's perplexity by source."""
        found = {}
        for index, name in enumerate(self.names):
            rows = (self.sources_N == index).nonzero().flatten().tolist()
            losses = torch.cat([self.predictions.losses(row)[self._counts(row)] for row in rows])
            found[name] = _exp(float(losses.double().mean()))
        return found

    def _counts(self, row: int) -> Tensor:
        """Return which of a window's tokens but the first count, bool [L - 1]."""
        following_L = self.predictions.windows_NL[row, 1:]
        return torch.isin(following_L, following_L.new_tensor(self.begin), invert=True)

    def _of_window(self, row: int, logits_LV: Tensor) -> Tensor:
        """Return the sums of divergence and loss over a window's tokens that count, and their number, float64 [3]."""
        device = logits_LV.device
        ids_L, counts_L = self.predictions.windows_NL[row].to(device), self._counts(row).to(device)
        loss_L = cross_entropy(logits_LV[:-1].float(), ids_L[1:], reduction="none")
        targets = Targets(*(value[:-1].to(device) for value in self.predictions.targets(row)))
        divergence_L = distillation_loss(logits_LV[:-1], targets)
        counted = [divergence_L[counts_L], loss_L[counts_L], counts_L]
        return torch.stack([values.double().sum() for values in counted]).cpu()


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
