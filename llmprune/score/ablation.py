"""Scores of layers by ablation: each layer is left out in turn, and the model's predictions are judged without it.

All ablated models of one round advance together. Up to the layer it lacks, an ablated model equals the current one, so
it starts as a copy of the hidden states there: a round over N layers takes N² / 2 layer passes instead of N², and every
layer's weights are loaded once.

Shapes: N windows or layers, B batch, L sequence length, D hidden size, P positions of a
chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.common.distributed import broadcast_from_first, sum_over_processes
from llmprune.common.errors import CalibrationError, NumericalError
from llmprune.common.linalg.device_sums import DeviceSums
from llmprune.common.progress import track
from llmprune.criteria.base import AblationCriterion
from llmprune.cut.layer_choice import may_remain
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStates
from llmprune.layerwise.logits import token_chunks
from llmprune.results.formatting import ranges
from llmprune.score.ablation_repair import AblationRepair
from llmprune.score.inputs import CalibrationBatches, DepthTarget


class LayerCosts(Protocol):
    """Costs of removing one more layer from a model."""

    def without_each(self, kept: Sequence[int], candidates: Collection[int]) -> dict[int, float]:
        """Return the cost of the model of the ``kept`` layers without each of the candidates in turn."""

    def remove(self, layer: int) -> None:
        """Remove a layer for good."""


def layer_ablation_scores(
    decoder: Decoder,
    anatomy: Anatomy,
    *,
    criterion: AblationCriterion,
    calibration: CalibrationBatches,
    target: DepthTarget,
) -> Tensor:
    """Return the score of every layer, float32 [N]; the lowest are removed first.

    A score is the mean cost of a token without the layer and all layers with lower scores, less that of the dense
    model. Layers that the model needs, or with ``target.keep_pattern`` its pattern, are not ablated.
    Raises NumericalError where the cost without a kept layer is not finite: such a layer is never chosen. Raises
    CalibrationError where the criterion cannot refit: for want of windows, or of layers that can be refit.
    """
    windows_NL = calibration.windows_NL
    judged_NL, rest_NL = evenly_spaced_subset(windows_NL, criterion.windows)
    repair = None
    if criterion.refit:
        criterion.require_samples(len(windows_NL))
        solved_NL, _ = evenly_spaced_subset(rest_NL, criterion.refit.windows)
        solved = replace(calibration, windows_NL=solved_NL)
        repair = AblationRepair(decoder, anatomy, calibration=solved, ridge=criterion.refit.ridge)
    costs = AblatedModels(decoder, criterion, calibration=replace(calibration, windows_NL=judged_NL), repair=repair)
    rounds = criterion.horizon(target.remove)
    may_keep = may_remain(anatomy, target.remove, keep_pattern=target.keep_pattern and rounds == target.remove)
    return rank_by_cost(costs, len(decoder), rounds=rounds, may_keep=may_keep, kind=criterion.kind)


def rank_by_cost(
    costs: LayerCosts, layers: int, *, rounds: int, may_keep: Callable[[set[int]], bool], kind: str
) -> Tensor:
    """Return scores of layers [N] that rise in the order of greedy removal; those of all kept layers are above them.

    In each round the layer whose removal costs least is removed. ``may_keep``: True for layers that a model may
    consist of. ``kind`` names the criterion in errors. Raises NumericalError where no cost of a round is finite, or
    that of a kept layer is not.
    """
    kept, scores_N = list(range(layers)), torch.zeros(layers)
    reached = -math.inf
    for _ in range(rounds):
        candidates = [layer for layer in kept if may_keep(set(kept) - {layer})]
        found = costs.without_each(kept, candidates)
        finite = {layer: cost for layer, cost in found.items() if math.isfinite(cost)}
        if not finite:
            raise _no_cost(kind, list(found))
        cheapest = min(finite, key=finite.__getitem__)
        reached = max(finite[cheapest], reached)  # not below the scores of the layers removed before
        above = float(torch.tensor(reached).nextafter(torch.tensor(math.inf)))
        for layer in kept:
            unknown = math.inf if layer in found else max(finite.values())
            scores_N[layer] = max(finite.get(layer, unknown), above)
        scores_N[cheapest] = reached
        kept.remove(cheapest)
        costs.remove(cheapest)
    if without_cost := [layer for layer in kept if not math.isfinite(scores_N[layer])]:
        raise _no_cost(kind, without_cost)
    return scores_N


def _no_cost(kind: str, layers: list[int]) -> NumericalError:
    """Return the error for layers without which the model has no finite cost."""
    named = f"layer {layers[0]}" if len(layers) == 1 else f"any of layers {ranges(layers)}"
    return NumericalError(
        f"depth.criterion {kind}: the cost of the model without {named} is not finite; "
        "try model.dtype: float32, or name the layers to remove in depth.layers"
    )


def evenly_spaced_subset(windows_NL: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return ``number`` windows, or all, evenly spaced over the calibration and so over its sources; and the others."""
    number = min(number, len(windows_NL))
    chosen_N = torch.zeros(len(windows_NL), dtype=torch.bool)
    chosen_N[torch.arange(number) * len(windows_NL) // max(number, 1)] = True
    return windows_NL[chosen_N], windows_NL[~chosen_N]


class AblatedModels:
    """Costs of a decoder without one more of its layers, by an ablation criterion; see ``LayerCosts``.

    ``repair``: refits the layer before an ablated one; None: the other layers do not change.
    """

    def __init__(
        self,
        decoder: Decoder,
        criterion: AblationCriterion,
        *,
        calibration: CalibrationBatches,
        repair: AblationRepair | None = None,
    ) -> None:
        self.decoder, self.criterion, self.repair = decoder, criterion, repair
        self._start = calibration.forward(decoder)  # before the first layer; copies of it advance
        self._dense: HiddenStates | None = None  # after the last layer; known after the first round
        self._removed = 0

    @torch.no_grad()
    def without_each(self, kept: Sequence[int], candidates: Collection[int]) -> dict[int, float]:
        """Return the mean cost of a token without each of the candidates, less that of the dense model."""
        ablated: dict[int, LayerwiseForward] = {}
        current = self._start.on(self._start.copy())
        if self.repair:
            self.repair.start_round()
        for index in track(kept, "ablation: leaving layers out"):
            with self.decoder.layer(index) as layer:
                if self.repair:
                    self.repair.apply(index, layer)
                for without in ablated.values():
                    without.pass_through(index, layer)
                if index in candidates:
                    ablated[index] = current.on(current.copy())
                if self.repair:
                    skipped = ablated[index].hidden_states if index in ablated else None
                    self.repair.follow(index, layer, judged=current, ablated=skipped)
                else:
                    current.pass_through(index, layer)
        self._dense = self._dense or current.hidden_states
        *costs, own = self._mean_costs(
            [*(without.hidden_states for without in ablated.values()), self._dense], self._dense
        )
        return broadcast_from_first({layer: cost - own for layer, cost in zip(ablated, costs, strict=True)})

    def remove(self, layer: int) -> None:
        """Remove a layer for good, and keep the refit for it."""
        if self.repair:
            if not self._removed and not self.repair.found:
                raise CalibrationError(
                    f"depth.criterion {self.criterion.kind}: no layer of this model can be refit to replace the one "
                    "after it, because a norm follows its output projection or it has no MLP; choose divergence, "
                    "which does not refit"
                )
            self.repair.accept(layer)
        self._removed += 1

    def _mean_costs(self, models: Sequence[HiddenStates], dense: HiddenStates) -> list[float]:
        """Return the mean cost of a token of each model, from its hidden states after the last layer."""
        device = self.decoder.device
        totals = DeviceSums(len(models) + 1)  # the last one counts tokens
        for batch in range(len(self._start.batches)):
            ids_BL = self._start.token_ids(batch)
            counted_BT = self._start.counted.targets(batch, device)
            for chunk in token_chunks(self._start, ids_BL):
                counted_BP = None if counted_BT is None else counted_BT[chunk.windows, chunk.positions]
                dense_BPV = chunk.next_token_logits(self._start, ids_BL, hidden_BLD=dense.at(batch, device))
                targets_BP = chunk.targets(ids_BL)
                for number, hidden_states in enumerate(models):
                    hidden_BLD = hidden_states.at(batch, device)
                    logits_BPV = chunk.next_token_logits(self._start, ids_BL, hidden_BLD=hidden_BLD)
                    costs_BP = self.criterion.token_costs(logits_BPV, dense_BPV, targets_BP=targets_BP)
                    totals.add(number, costs_BP if counted_BP is None else costs_BP.where(counted_BP, 0))
                if counted_BP is None:
                    totals.count(-1, targets_BP.numel())
                else:
                    totals.add(-1, counted_BP)
        (total_M,) = totals.reducible_state()
        sum_over_processes([total_M])
        return (total_M[:-1] / total_M[-1]).tolist()
