"""Trials: leave each layer out in turn, and judge what the model then says.

All variants of one round are walked together. Before the layer that it lacks, a variant
is the model itself, so that it starts as a copy of the stream there: a round over N layers is N² / 2
visits of a layer instead of N², and every layer's weights are brought once.

Shapes: N windows, B batch, L sequence length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.criteria.base import TrialCriterion
from llmprune.errors import NumericalError
from llmprune.model.processes import share_of, sum_over_processes
from llmprune.model.streams import Streams, StreamStore
from llmprune.model.walk import Decoder, Walk
from llmprune.progress import track


def try_without(
    decoder: Decoder,
    criterion: TrialCriterion,
    windows_NL: Tensor,
    batch_size: int,
    remove: int,
    one_of: tuple[int, ...] = (),
    store: StreamStore = StreamStore(),  # noqa: B008  # frozen
) -> Tensor:
    """Score of every layer, float32 [number of layers]; the ``remove`` lowest go, in the order of their scores.

    A score is the mean cost of a token once the layer and all with lower scores are out.
    Of ``one_of``, if there are any, one layer is never left out.
    """
    trials = _Trials(decoder, criterion, share_of(some_windows(windows_NL, criterion.windows)), batch_size, store)
    kept, scores_N = list(range(len(decoder))), torch.zeros(len(decoder))
    reached = 0.0
    for _ in range(criterion.horizon(remove)):
        free = [layer for layer in kept if set(one_of) - {layer} & set(kept) or not one_of]
        costs = trials.round(kept, free)
        best = min(costs, key=costs.__getitem__)
        for layer in kept:  # not below what those before it cost: they go first
            scores_N[layer] = max(costs.get(layer, max(costs.values())), reached)
        reached = float(scores_N[best])
        kept.remove(best)
    if not torch.isfinite(scores_N[kept]).all():
        raise NumericalError("the cost without a layer is not finite; try model.dtype: float32")
    return scores_N


def some_windows(windows_NL: Tensor, number: int) -> Tensor:
    """So many of the windows, or all, evenly over the calibration and so over its sources."""
    number = min(number, len(windows_NL))
    return windows_NL[torch.arange(number) * len(windows_NL) // number]


class _Trials:
    def __init__(
        self, decoder: Decoder, criterion: TrialCriterion, windows_NL: Tensor, batch_size: int, store: StreamStore
    ) -> None:
        self.decoder, self.criterion = decoder, criterion
        self.walk = Walk(decoder, windows_NL, batch_size, store)
        self.start = self.walk.copy()
        self.dense: Streams | None = None  # after the last layer

    @torch.no_grad()
    def round(self, kept: list[int], free: list[int]) -> dict[int, float]:
        """Mean cost of a token without each of the free layers, of those that are kept so far."""
        walk, variants = self.walk, dict[int, Streams]()
        walk.streams = self.start
        base = walk.copy()
        for index in track(kept, "trials: leaving layers out"):
            with self.decoder.layer(index) as layer:
                for walk.streams in variants.values():
                    walk.pass_through(index, layer)
                walk.streams = base
                if index in free:
                    variants[index] = walk.copy()
                walk.pass_through(index, layer)
        self.dense = self.dense or base
        costs = self._costs(list(variants.values()), self.dense)
        return dict(zip(variants, costs, strict=True))

    def _costs(self, variants: list[Streams], dense: Streams) -> list[float]:
        totals_V = torch.zeros(len(variants) + 1, dtype=torch.float64)  # the last one counts tokens
        for batch, ids_BL in enumerate(self.walk.batches):
            dense_BLV = self._logits(dense, batch)
            for number, streams in enumerate(variants):
                cost_BL = self.criterion.cost(self._logits(streams, batch), dense_BLV, ids_BL.to(dense_BLV.device))
                totals_V[number] += float(cost_BL.sum(dtype=torch.float64))
            totals_V[-1] += cost_BL.numel()
        sum_over_processes([totals_V])
        return (totals_V[:-1] / totals_V[-1]).tolist()

    def _logits(self, streams: Streams, batch: int) -> Tensor:
        self.walk.streams = streams
        return self.walk.logits(batch)
