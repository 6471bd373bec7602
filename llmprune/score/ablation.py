"""Trials: leave each layer out in turn, and judge what the model then says.

All variants of one round are walked together. Before the layer that it lacks, a variant
is the model itself, so that it starts as a copy of the stream there: a round over N layers is N² / 2
visits of a layer instead of N², and every layer's weights are brought once.

Shapes: N windows, B batch, L sequence length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.common.distributed import from_first, share_of, sum_over_processes
from llmprune.common.errors import CalibrationError, NumericalError
from llmprune.common.progress import track
from llmprune.criteria.base import TrialCriterion
from llmprune.criteria.depth.repaired_divergence import Residual
from llmprune.cut.layer_choice import may_go
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStates, HiddenStateStore
from llmprune.results.formatting import ranges
from llmprune.score.ablation_repair import Standins


def layer_ablation_scores(
    decoder: Decoder,
    anatomy: Anatomy,
    *,
    criterion: TrialCriterion,
    windows_NL: Tensor,
    batch_size: int,
    remove: int,
    store: HiddenStateStore = HiddenStateStore(),  # noqa: B008  # frozen
    keep_pattern: bool = False,
) -> Tensor:
    """Score of every layer, float32 [number of layers]; the ``remove`` lowest go, in the order of their scores.

    A score is the mean cost of a token once the layer and all with lower scores are out, less the dense model's.
    Of layers of which one must stay, one is never left out. ``keep_pattern``: nor is a layer, one after the other,
    without which those that stay in the end cannot follow the model's pattern. Raises NumericalError where the cost
    without a layer that stays is not finite: such a layer is never chosen.
    """
    judged_NL, rest_NL = some_windows(windows_NL, criterion.windows)
    trials = _Trials(decoder, criterion, windows_NL=share_of(judged_NL), batch_size=batch_size, store=store)
    if isinstance(criterion, Residual):
        require_rest(criterion, len(windows_NL))
        solved_NL, _ = some_windows(rest_NL, criterion.refit_windows)
        trials.standins = Standins(
            decoder, anatomy, windows_NL=share_of(solved_NL), batch_size=batch_size, store=store, ridge=criterion.ridge
        )
    greedy = criterion.horizon(remove) == remove
    check = may_go(anatomy, remove, keep_pattern=keep_pattern and greedy)
    kept, scores_N = list(range(len(decoder))), torch.zeros(len(decoder))
    reached = -math.inf
    for done in range(criterion.horizon(remove)):
        free = [layer for layer in kept if check(set(kept) - {layer})]
        costs = trials.round(kept, free)
        known = {layer: cost for layer, cost in costs.items() if math.isfinite(cost)}
        if not known:
            raise _no_cost(criterion, list(costs))
        best = min(known, key=known.__getitem__)
        reached = max(known[best], reached)  # not below what those before it cost: they go first
        above = float(torch.tensor(reached).nextafter(torch.tensor(math.inf)))
        for layer in kept:
            scores_N[layer] = max(known.get(layer, math.inf if layer in costs else max(known.values())), above)
        scores_N[best] = reached
        kept.remove(best)
        if trials.standins:
            if not done and not trials.standins.found:
                raise CalibrationError(
                    "depth.criterion residual: no layer of this model can stand in for the one after it, for a norm "
                    "follows its output projection or it has no MLP; take divergence, which does not ask for that"
                )
            trials.standins.accept(best)
    if unknown := [layer for layer in kept if not math.isfinite(scores_N[layer])]:
        raise _no_cost(criterion, unknown)
    return scores_N


def _no_cost(criterion: TrialCriterion, layers: list[int]) -> NumericalError:
    """Return the error for layers without which the model has no finite cost."""
    named = f"layer {layers[0]}" if len(layers) == 1 else f"any of layers {ranges(layers)}"
    return NumericalError(
        f"depth.criterion {criterion.kind}: the cost of the model without {named} is not finite; "
        "try model.dtype: float32, or name the layers that go in depth.layers"
    )


def require_rest(criterion: Residual, samples: int) -> None:
    """Raise CalibrationError where the criterion judges on all calibration samples and has none to refit on."""
    if samples <= criterion.windows:
        raise CalibrationError(
            f"depth.criterion residual judges on {samples} of {samples} calibration samples, which leaves none to "
            "refit on; lower depth.criterion.windows or raise calibration.samples"
        )


def some_windows(windows_NL: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """So many of the windows, or all, evenly over the calibration and so over its sources; and the others."""
    number = min(number, len(windows_NL))
    chosen_N = torch.zeros(len(windows_NL), dtype=torch.bool)
    chosen_N[torch.arange(number) * len(windows_NL) // max(number, 1)] = True
    return windows_NL[chosen_N], windows_NL[~chosen_N]


class _Trials:
    def __init__(
        self,
        decoder: Decoder,
        criterion: TrialCriterion,
        *,
        windows_NL: Tensor,
        batch_size: int,
        store: HiddenStateStore,
    ) -> None:
        self.decoder, self.criterion = decoder, criterion
        self.walk = LayerwiseForward(decoder, windows_NL, batch_size=batch_size, store=store)
        self.start = self.walk.copy()
        self.dense: HiddenStates | None = None  # after the last layer
        self.standins: Standins | None = None

    @torch.no_grad()
    def round(self, kept: list[int], free: list[int]) -> dict[int, float]:
        """Mean cost of a token without each of the free layers, of those that are kept, less the dense model's."""
        walk, variants = self.walk, dict[int, HiddenStates]()
        walk.streams = self.start
        base = walk.copy()
        if self.standins:
            self.standins.start()
        for index in track(kept, "trials: leaving layers out"):
            with self.decoder.layer(index) as layer:
                if self.standins:
                    self.standins.repair(index, layer)
                for walk.streams in variants.values():
                    walk.pass_through(index, layer)
                walk.streams = base
                if index in free:
                    variants[index] = walk.copy()
                if self.standins:
                    self.standins.follow(index, layer, judged=walk, without=variants.get(index))
                else:
                    walk.pass_through(index, layer)
        self.dense = self.dense or base
        *costs, own = self._costs([*variants.values(), self.dense], self.dense)
        return from_first({layer: cost - own for layer, cost in zip(variants, costs, strict=True)})

    def _costs(self, variants: list[HiddenStates], dense: HiddenStates) -> list[float]:
        totals_V = torch.zeros(len(variants) + 1, dtype=torch.float64)  # the last one counts tokens
        for batch, ids_BL in enumerate(self.walk.batches):
            dense_BLV = self._logits(dense, batch)
            for number, streams in enumerate(variants):
                cost_BL = self.criterion.cost(
                    self._logits(streams, batch), dense_BLV, ids_BL=ids_BL.to(dense_BLV.device)
                )
                totals_V[number] += float(cost_BL.sum(dtype=torch.float64))
            totals_V[-1] += cost_BL.numel()
        sum_over_processes([totals_V])
        return (totals_V[:-1] / totals_V[-1]).tolist()

    def _logits(self, streams: HiddenStates, batch: int) -> Tensor:
        self.walk.streams = streams
        return self.walk.logits(batch)
