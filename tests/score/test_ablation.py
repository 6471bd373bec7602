"""Layers scored by ablation: costs of models without a layer, and the greedy order that follows from them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.scored import ablation_scores
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hooks import inputs_of
from llmprune.common.errors import NumericalError
from llmprune.criteria.ablation import AblationCriterion, first_predicted
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.cut.decision import choose_layers
from llmprune.layerwise import logits
from llmprune.score.ablation import AblatedModels, RemovalCandidates, evenly_spaced_subset, rank_by_cost
from llmprune.score.inputs import CalibrationBatches
from llmprune.score.layer_turns import Layers, turns_of
from llmprune.score.removed_together import with_best_span


def logits_without(model: PreTrainedModel, removed: set[int], windows_NL: Tensor) -> Tensor:
    """Logits of transformers' own forward with layers taken out of the list."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in removed)
    model.config.num_hidden_layers = len(model.model.layers)
    try:
        with torch.no_grad():
            return model(input_ids=windows_NL, use_cache=False).logits
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)


def mean_cost(criterion: AblationCriterion, model: PreTrainedModel, removed: set[int], windows_NL: Tensor) -> float:
    """Growth of the criterion's mean cost, by whole forward passes."""
    dense_NLV, other_NLV = (logits_without(model, without, windows_NL) for without in (set[int](), removed))
    cost, own = (
        criterion.token_costs(logits_NLV[:, :-1], dense_NLV[:, :-1], targets_BP=windows_NL[:, 1:]).mean()
        for logits_NLV in (other_NLV, dense_NLV)
    )
    return float(cost - own)


class GivenCosts:
    """Costs that are known beforehand, round by round."""

    def __init__(self, *rounds: dict[int, float]) -> None:
        self.rounds = iter(rounds)
        self.removed: list[int] = []
        self.asked: list[list[int]] = []

    def without_each(self, kept: Sequence[int], candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return the costs of the next round."""
        assert set(kept).isdisjoint(self.removed)
        self.asked.append([layer for (layer,) in candidates])
        costs = next(self.rounds)
        return {(layer,): cost for layer, cost in costs.items() if (layer,) in candidates}

    def turns(self, candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return that no layer turns anything."""
        return dict.fromkeys(candidates, 0.0)

    def remove(self, layer: int) -> None:
        """Note the layer."""
        self.removed.append(layer)


def ranked(*rounds: dict[int, float], kind: str = "divergence") -> Tensor:
    """Scores of four layers whose ablations cost this, round by round."""
    return rank_by_cost(GivenCosts(*rounds), RemovalCandidates(4, lambda _: True), rounds=len(rounds), kind=kind)


@pytest.mark.parametrize("kind", [Perplexity, Divergence])
def test_one_shot_ablation_equals_whole_forward_passes(
    kind: type[AblationCriterion], model: PreTrainedModel, windows: Tensor
) -> None:
    """Ablated models that share the dense prefix cost what models without the layer cost, whatever the batches."""
    criterion = kind(windows=4, greedy=False, tokens=None)
    scores_N = ablation_scores(model, criterion, windows, remove=1, batch_size=3)
    judged, rest = evenly_spaced_subset(windows, 4)
    assert len(rest) == 2
    expected = [mean_cost(criterion, model, {layer}, judged) for layer in range(len(scores_N))]
    torch.testing.assert_close(scores_N, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_layers_left_out_together_cost_what_models_without_both_do(model: PreTrainedModel, windows: Tensor) -> None:
    """Consecutive or not, from the dense model or from one that lacks a layer."""
    criterion = Divergence(windows=6)
    costs = AblatedModels(dense_decoder(model), criterion, calibration=CalibrationBatches(windows, 4))
    together: list[Layers] = [(0, 1), (0, 3), (3, 4)]
    found = costs.without_each(range(5), together)
    expected = {layers: mean_cost(criterion, model, set(layers), windows) for layers in together}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    costs.remove(2)
    found = costs.without_each([0, 1, 3, 4], [(1, 3)])
    expected = {(1, 3): mean_cost(criterion, model, {1, 2, 3}, windows)}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", [Perplexity, Divergence])
def test_greedy_ablation_chooses_one_layer_after_the_other(
    kind: type[AblationCriterion], model: PreTrainedModel, windows: Tensor
) -> None:
    """Each round removes the layer that costs least without those removed before, even if less than they did."""
    criterion = kind(windows=6, greedy=True, candidates=None, tokens=None)
    if isinstance(criterion, Divergence):
        criterion = criterion.model_copy(update={"spans": False})
    scores_N = ablation_scores(model, criterion, windows, remove=3)
    layers = range(len(scores_N))
    removed: set[int] = set()
    for _ in range(3):
        kept = [layer for layer in layers if layer not in removed]
        removed.add(min(kept, key=lambda layer: mean_cost(criterion, model, removed | {layer}, windows)))
    assert set(choose_layers(scores_N, len(layers) - 3)) == set(layers) - removed
    if kind is Divergence:
        cost = mean_cost(criterion, model, removed, windows)
        assert float(scores_N[list(removed)].max()) == pytest.approx(cost, rel=1e-3)


def test_short_windows_are_judged_on_their_last_quarter(model: PreTrainedModel, windows: Tensor) -> None:
    """Of each window the beginning is passed through the models, and the rest of it is context."""
    criterion, first = Divergence(windows=4, greedy=False, tokens=8), 6
    scores_N = ablation_scores(model, criterion, windows, remove=1, batch_size=3)
    judged_NL = evenly_spaced_subset(windows, 4)[0][:, :8]
    for layer, score in enumerate(scores_N.tolist()):
        dense_NLV, other_NLV = (logits_without(model, without, judged_NL) for without in (set[int](), {layer}))
        costs_NP = criterion.token_costs(
            other_NLV[:, first - 1 : -1], dense_NLV[:, first - 1 : -1], targets_BP=judged_NL[:, first:]
        )
        assert score == pytest.approx(float(costs_NP.mean()), rel=1e-4)


@pytest.mark.parametrize(("length", "first"), [(2, 1), (3, 2), (4, 3), (8, 6), (256, 192)])
def test_a_short_window_has_a_token_to_predict(length: int, first: int) -> None:
    """It is in the last quarter, or the last token of a shorter window."""
    assert first_predicted(length, is_short=True) == first < length


def test_a_layer_that_gets_cheaper_by_the_loss_of_another_is_removed_after_it() -> None:
    """Scores rise in the order of removal, and those of all kept layers are above them."""
    scores_N = ranked({0: 3.0, 1: 1.0, 2: 2.0, 3: 2.5}, {0: 0.5, 2: 0.7, 3: 0.6})
    assert choose_layers(scores_N, 2) == (2, 3)


def test_costs_are_told_which_layers_are_removed() -> None:
    """The next round is one of the model without them."""
    costs = GivenCosts({0: 3.0, 1: 1.0, 2: 2.0}, {0: 0.5, 2: 0.7})
    rank_by_cost(costs, RemovalCandidates(3, lambda _: True), rounds=2, kind="divergence")
    assert costs.removed == [1, 0]


def test_later_rounds_ablate_the_cheapest_of_the_first() -> None:
    """As many as asked for, of layers that may still go; those that are not ablated again score above those that go."""
    costs = GivenCosts({0: 4.0, 1: 1.0, 2: 2.0, 3: 3.0}, {2: 9.0, 3: 5.0}, {0: 7.0, 2: 9.0})
    choice = RemovalCandidates(4, lambda kept: 2 in kept or 3 in kept, number=2)
    scores_N = rank_by_cost(costs, choice, rounds=3, kind="divergence")
    assert costs.asked == [[0, 1, 2, 3], [2, 3], [0]]
    assert costs.removed == [1, 3, 0]
    assert choose_layers(scores_N, 1) == (2,)
    assert choose_layers(scores_N, 2) == (0, 2)


class TogetherCosts(GivenCosts):
    """Costs of layers that go together."""

    def __init__(self, costs: dict[Layers, float]) -> None:
        super().__init__()
        self.costs = costs

    def without_each(self, kept: Sequence[int], candidates: Collection[Layers]) -> dict[Layers, float]:
        """Return them, infinity where none is given."""
        return {layers: self.costs.get(layers, math.inf) for layers in candidates}


@pytest.mark.parametrize(
    ("costs", "removed"),
    [
        ({(0, 3): 2.0, (1, 2): 1.0}, {1, 2}),
        ({(0, 3): 2.0, (1, 2): 2.0}, {0, 3}),
        ({(0, 3): 2.0, (2, 3): 0.5, (1, 2): 1.0}, {1, 2}),
        ({(0, 3): math.nan, (1, 2): math.inf}, {0, 3}),
    ],
    ids=["cheaper", "as cheap", "may not go", "not finite"],
)
def test_consecutive_layers_go_where_they_cost_less_than_those_chosen(
    costs: dict[Layers, float], removed: set[int]
) -> None:
    """The lowest scores are then theirs, and the others are above; a span that may not go is not judged."""
    scores_N = torch.tensor([1.0, 5.0, 6.0, 1.5, 7.0])
    found_N = with_best_span(scores_N, TogetherCosts(costs), kept=(1, 2, 4), may_keep=lambda left: left != {0, 1, 4})
    assert set(range(5)) - set(choose_layers(found_N, 3)) == removed
    assert found_N.isfinite().all()


def test_of_layers_that_cost_about_the_same_those_go_that_turn_least() -> None:
    """What costs more than half as much again stays, however little it turns."""
    costs = TogetherCosts({(0, 3): 2.0, (1, 2): 1.5, (2, 3): 1.6, (0, 1): 2.3})
    costs.turns = lambda candidates: {one: {(0, 1): 0.1, (2, 3): 0.2}.get(one, 0.5) for one in candidates}  # type: ignore[method-assign]
    scores_N = torch.tensor([1.0, 5.0, 6.0, 1.5, 7.0])
    found_N = with_best_span(scores_N, costs, kept=(1, 2, 4), may_keep=lambda _: True)
    assert choose_layers(found_N, 3) == (0, 1, 4)


def test_turns_are_those_of_normed_hidden_states(model: PreTrainedModel, windows: Tensor) -> None:
    """Of positions that predict a token that counts; those of several spans add up."""
    first = 5
    start = CalibrationBatches(windows, 4, first_target=first).forward(dense_decoder(model))
    with torch.no_grad():
        states = model.model(input_ids=windows, use_cache=False, output_hidden_states=True).hidden_states[:-1]
        last = logits_input(model, windows)
        read = [*(model.model.norm(one_NLD) for one_NLD in states), last]
    between = [
        1 - nn.functional.cosine_similarity(read[a], read[b], dim=-1)[:, first - 1 : -1].mean()
        for a, b in ((0, 1), (2, 4), (1, 5))
    ]
    found = turns_of([(0, 2, 3), (1, 2, 3, 4)], start)
    assert found[0, 2, 3] == pytest.approx(float(between[0] + between[1]), rel=1e-4)
    assert found[1, 2, 3, 4] == pytest.approx(float(between[2]), rel=1e-4)


def logits_input(model: PreTrainedModel, windows_NL: Tensor) -> Tensor:
    """Return what the head reads of the last layer's output."""
    seen: list[Tensor] = []
    with inputs_of(model.lm_head, seen.append):
        model(input_ids=windows_NL, use_cache=False)
    return seen[0]


def test_the_cheapest_span_is_that_of_whole_forward_passes(model: PreTrainedModel, windows: Tensor) -> None:
    """What is removed costs little more than any consecutive layers do, or those that cost least alone."""
    criterion = Divergence(windows=6, tokens=None)
    removed = []
    for spans in (True, False):
        scores_N = ablation_scores(model, criterion.model_copy(update={"spans": spans}), windows, remove=2)
        removed.append(set(range(5)) - set(choose_layers(scores_N, 3)))
    costs = [mean_cost(criterion, model, layers, windows) for layers in [*removed, *({i, i + 1} for i in range(4))]]
    assert min(costs) <= costs[0] <= 1.5 * min(costs)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_a_layer_without_a_finite_cost_is_never_chosen(cost: float) -> None:
    """It is kept, and unless a later round finds its cost, an error names the layer and the criterion."""
    scores_N = ranked({0: cost, 1: 2.0, 2: 1.0, 3: 3.0}, {0: 5.0, 1: 2.0, 3: 3.0})
    assert choose_layers(scores_N, 2) == (0, 3)
    with pytest.raises(NumericalError, match=r"criterion divergence: the cost of the model without layer 0 is not"):
        ranked({0: cost, 1: 2.0, 2: 1.0, 3: 3.0})


def test_no_finite_cost_at_all_names_the_layers_and_the_criterion() -> None:
    """Where no layer can be chosen, none is removed."""
    with pytest.raises(NumericalError, match=r"criterion perplexity: .* without any of layers 0–3 is not finite"):
        ranked(dict.fromkeys(range(4), math.nan), kind="perplexity")


def test_ablation_leaves_one_of_the_needed_layers(model: PreTrainedModel, windows: Tensor) -> None:
    """The last layer of a kind that the model needs is never ablated."""
    anatomy = replace(discover(model.config), one_of=(1, 4))
    scores_N = ablation_scores(model, Perplexity(windows=2), windows, remove=4, anatomy=anatomy)
    assert torch.isfinite(scores_N).all()
    assert {1, 4} & set(choose_layers(scores_N, 1, one_of=(1, 4)))


def test_the_dense_model_costs_what_its_text_does(model: PreTrainedModel, windows: Tensor) -> None:
    """The divergence of a model from itself is 0, its cross entropy that of the text."""
    dense_NTV, targets_NT = logits_without(model, set(), windows)[:, :-1], windows[:, 1:]
    assert float(Divergence().token_costs(dense_NTV, dense_NTV, targets_BP=targets_NT).abs().max()) < 1e-5
    expected = nn.functional.cross_entropy(dense_NTV.flatten(0, 1), targets_NT.flatten())
    torch.testing.assert_close(Perplexity().token_costs(dense_NTV, dense_NTV, targets_BP=targets_NT).mean(), expected)


@pytest.mark.parametrize("criterion", [Perplexity(windows=3), Divergence(windows=3)], ids=lambda one: one.kind)
def test_costs_in_chunks_are_those_of_whole_batches(
    model: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch, criterion: AblationCriterion
) -> None:
    """A large vocabulary's logits are computed for some tokens at a time, with the same scores."""
    whole_N = ablation_scores(model, criterion, windows, remove=2)
    monkeypatch.setattr(logits, "MAX_LOGITS", 5 * model.config.vocab_size)
    torch.testing.assert_close(ablation_scores(model, criterion, windows, remove=2), whole_N, rtol=1e-5, atol=1e-6)
