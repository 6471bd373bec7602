"""Scores of layers by ablation: each layer is left out in turn, and the model's predictions are judged without it.

All ablated models of one round advance together. Up to the layer it lacks, an ablated model equals the current one, so
it starts as a copy of the hidden states there: a round over N layers takes N² / 2 layer passes instead of N², and every
layer's weights are loaded once.

Shapes: N windows or layers, L sequence length, S sources, M models, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.anatomy.types import Anatomy
from llmprune.common.distributed import broadcast_from_first, world_size
from llmprune.common.errors import CalibrationError, NumericalError
from llmprune.common.progress import track
from llmprune.criteria.ablation import AblationCriterion, evenly_spaced, first_predicted
from llmprune.criteria.combine import Combine, combine_scores
from llmprune.cut.layer_choice import choose_in_pattern, may_remain, required_kinds
from llmprune.layerwise.decoder import Decoder
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.window_groups import WindowGroups
from llmprune.results.formatting import ranges
from llmprune.score.ablation_repair import AblationRepair
from llmprune.score.inputs import CalibrationBatches, DepthTarget
from llmprune.score.layer_turns import Layers, turns_of
from llmprune.score.mean_costs import MeanCosts
from llmprune.score.removed_together import LayerCosts, above, known, with_best_span


def layer_ablation_scores(
    decoder: Decoder,
    anatomy: Anatomy,
    *,
    criterion: AblationCriterion,
    calibration: CalibrationBatches,
    target: DepthTarget,
) -> Tensor:
    """Return the score of every layer, float32 [N]; the lowest are removed first.

    A score is the mean cost of a token without the layer, less that of the dense model; with greedy removal without all
    layers with lower scores too. Those of a span that is better removed than the lowest (``best_together``) become the
    lowest. Where sources are told apart, the layers' ranks by each of them in a round are combined. Layers without
    which no allowed choice is left are not ablated.
    Raises NumericalError where the cost without a kept layer is not finite: such a layer is never chosen. Raises
    CalibrationError where the criterion cannot refit: for want of windows, or of layers that can be refit.
    """
    spread_N = _spread_over_sources(calibration)
    judged_N, rest_N = evenly_spaced_subset(spread_N, max(criterion.windows, world_size()))  # one for each process
    repair = None
    if criterion.refit:
        criterion.require_samples(len(spread_N))
        solved_N, _ = evenly_spaced_subset(rest_N, criterion.refit.windows)
        repair = AblationRepair(decoder, anatomy, calibration=calibration.at(solved_N), ridge=criterion.refit.ridge)
    if calibration.sources_N is not None:
        criterion.require_sources(calibration.sources_N.bincount().tolist())
    judged = _shortened(calibration.at(judged_N), criterion.tokens)
    costs = AblatedModels(decoder, criterion, calibration=judged, repair=repair)
    rounds, layers = criterion.rounds(target.remove), len(decoder)
    kinds = required_kinds(anatomy, keep_pattern=target.keep_pattern)
    may_keep = may_remain(anatomy, target.remove, kinds=kinds if rounds == target.remove else ())
    choice = RemovalCandidates(layers, may_keep, number=criterion.candidates)
    scores_N = rank_by_cost(costs, choice, rounds=rounds, kind=criterion.kind)
    if not criterion.judges_spans(target.remove):
        return scores_N
    kept = choose_in_pattern(scores_N, layers - target.remove, anatomy=anatomy, keep_pattern=target.keep_pattern)
    may_keep = may_remain(anatomy, target.remove, kinds=kinds)
    return with_best_span(scores_N, costs, kept=kept, may_keep=may_keep)


def _shortened(calibration: CalibrationBatches, tokens: int | None) -> CalibrationBatches:
    """Return the batches of the beginnings of windows, of which the last quarter counts; None: of whole windows."""
    if tokens is None:
        return calibration
    windows_NL = calibration.windows_NL[:, :tokens]
    first = first_predicted(windows_NL.shape[1], is_short=True)
    return replace(calibration, windows_NL=windows_NL, first_target=first)


@dataclass(frozen=True)
class RemovalCandidates:
    """Layers that each round of a greedy removal ablates, of ``layers`` layers.

    The first round ablates all that may go, each later one the ``number`` of them that the first found cheapest, or all
    where it is None. ``may_keep``: True for layers that a model may consist of.
    """

    layers: int
    may_keep: Callable[[set[int]], bool]
    number: int | None = None

    def of_round(self, kept: Sequence[int], first: Mapping[int, float]) -> list[int]:
        """Return the candidates among the ``kept`` layers. ``first``: costs of the first round; empty before it."""
        allowed = [layer for layer in kept if self.may_keep(set(kept) - {layer})]
        if not first or self.number is None:
            return allowed
        return sorted(sorted(allowed, key=lambda layer: (known(first.get(layer)), layer))[: self.number])


def rank_by_cost(costs: LayerCosts, choice: RemovalCandidates, *, rounds: int, kind: str) -> Tensor:
    """Return scores of layers [N] that rise in the order of greedy removal; those of all kept layers are above them.

    In each round the candidate whose removal costs least is removed. ``kind`` names the criterion in errors. Raises
    NumericalError where no cost of a round is finite, or that of a kept layer is not.
    """
    kept, scores_N = list(range(choice.layers)), torch.zeros(choice.layers)
    first: dict[int, float] = {}
    reached = -math.inf
    for _ in range(rounds):
        ablated = costs.without_each(kept, [(layer,) for layer in choice.of_round(kept, first)])
        found = {layer: cost for (layer,), cost in ablated.items()}
        first = first or found
        finite = {layer: cost for layer, cost in found.items() if math.isfinite(cost)}
        if not finite:
            raise _no_cost(kind, list(found))
        cheapest = min(finite, key=finite.__getitem__)
        reached = max(finite[cheapest], above(reached))  # above the scores of the layers removed before
        for layer in kept:
            score = found.get(layer, max(first.get(layer, -math.inf), *finite.values()))
            scores_N[layer] = max(score, above(reached)) if math.isfinite(score) else math.inf
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


def _spread_over_sources(calibration: CalibrationBatches) -> Tensor:
    """Return the numbers of the windows, int64 [N]; those of a source together where sources are told apart."""
    if calibration.sources_N is None:
        return torch.arange(len(calibration.windows_NL))
    return calibration.sources_N.argsort(stable=True)


def _combined(costs_SC: Tensor, rule: Combine) -> Tensor:
    """Return one cost of each candidate [C] from those by each source; not finite where any of them is not."""
    if len(costs_SC) == 1:
        return costs_SC[0]
    known_SC = costs_SC.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    ranks_C = combine_scores(list(known_SC), rule).double()
    return ranks_C.where(costs_SC.isfinite().all(0), math.inf)


def evenly_spaced_subset(windows_NL: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return ``number`` windows, or all, evenly spaced over the calibration and so over its sources; and the others."""
    chosen_N = torch.zeros(len(windows_NL), dtype=torch.bool)
    chosen_N[evenly_spaced(min(number, len(windows_NL)), len(windows_NL))] = True
    return windows_NL[chosen_N], windows_NL[~chosen_N]


class AblatedModels:
    """Costs of a decoder without one more of its layers, by an ablation criterion; see ``LayerCosts``.

    ``repair``: refits the layer before an ablated one; None: the other layers do not change. ``title``: of its reports
    of progress.
    """

    def __init__(
        self,
        decoder: Decoder,
        criterion: AblationCriterion,
        *,
        calibration: CalibrationBatches,
        repair: AblationRepair | None = None,
        title: str = "ablation: leaving layers out",
    ) -> None:
        self.decoder, self.criterion, self.repair, self._title = decoder, criterion, repair, title
        self._start = calibration.forward(decoder)  # before the first layer; copies of it advance
        self._dense: HiddenStates | None = None  # after the last layer; known after the first round
        self._removed = 0
        self._combine, sources_N = calibration.combine, calibration.sources_N
        groups = None if sources_N is None else WindowGroups(sources_N, calibration.batch_size)
        self._costs = MeanCosts(self._start, criterion.token_costs, groups)

    @torch.no_grad()
    def without_each(self, kept: Sequence[int], candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return the mean cost of a token without each of the candidates, less that of the dense model."""
        assert self.repair is None or all(len(one) == 1 for one in candidates), "only one layer is replaced by a refit"
        ablated: dict[Layers, LayerwiseForward] = {}
        current = self._start.on(self._start.copy())
        if self.repair:
            self.repair.start_round()
        for index in track(kept, self._title):
            with self.decoder.layer(index) as layer:
                if self.repair:
                    self.repair.apply(index, layer)
                for layers, without in ablated.items():
                    if index not in layers:
                        without.pass_through(index, layer)
                ablated |= {one: current.on(current.copy()) for one in candidates if one[0] == index}
                if self.repair:
                    skipped = ablated[(index,)].hidden_states if (index,) in ablated else None
                    self.repair.follow(index, layer, judged=current, ablated=skipped)
                else:
                    current.pass_through(index, layer)
        self._dense = self._dense or current.hidden_states
        models = [*(without.hidden_states for without in ablated.values()), self._dense]
        costs_SM = self._costs.of(models, self._dense)
        if not costs_SM[:, -1].isfinite().all():
            raise NumericalError(
                f"depth.criterion {self.criterion.kind}: there was NaN or infinity in the logits of the dense model, "
                "though not in its layers; look at its norm and head, or try model.dtype: float32"
            )
        costs_C = _combined(costs_SM[:, :-1] - costs_SM[:, -1:], self._combine)
        return broadcast_from_first(dict(zip(ablated, costs_C.tolist(), strict=True)))

    def turns(self, candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return by how much each candidate turns what the dense model's head reads."""
        return turns_of(candidates, self._start)

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
