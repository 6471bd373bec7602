"""The parts that decide and repair: criteria, cut, refit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch

from llmprune.checkpoint.loading import dense_decoder
from llmprune.common.errors import NumericalError, RecipeError
from llmprune.common.linalg import cross_validated_ridge as normal_equations
from llmprune.common.linalg.cross_validated_ridge import NormalEquations, Repair, for_all_folds
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.width.activation import Activation
from llmprune.cut.decision import Cut, choose_highest, choose_layers, gap_after, kept_share
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.residual_scale import residual_scale
from llmprune.prune.repair.folds import folds_of
from llmprune.recipe.refit import Refit
from llmprune.score.scores import Scores
from llmprune.testing import VOCABULARY, tiny_model


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    """Batches of any size add up to the definition over all tokens."""
    before, after = _normal(6, 5, 8), _normal(6, 5, 8, seed=1)
    accumulator = BlockInfluence().make_accumulator(torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 6)):
        accumulator.update(before[part], after[part])
    expected = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
    torch.testing.assert_close(accumulator.score(), expected)


def test_a_layer_that_changes_nothing_has_no_influence() -> None:
    """The identity scores 0, a reversal scores 2."""
    hidden = _normal(2, 3, 4)
    for output, expected in ((hidden, 0.0), (-hidden, 2.0)):
        accumulator = BlockInfluence().make_accumulator(torch.device("cpu"))
        accumulator.update(hidden, output)
        assert float(accumulator.score()) == pytest.approx(expected, abs=1e-6)


def test_activation_score_is_the_energy_that_a_neuron_writes() -> None:
    """Mean square of the activation times the squared norm of the neuron's output column."""
    weight_DF, activation_BLF = _normal(3, 5), _normal(2, 7, 5, seed=1)
    accumulator = Activation().make_accumulator(weight_DF)
    accumulator.update(activation_BLF[:1])
    accumulator.update(activation_BLF[1:])
    written = activation_BLF.flatten(0, 1)[:, None, :] * weight_DF  # [T, D, F]
    torch.testing.assert_close(accumulator.scores(), written.square().sum(1).mean(0))


def test_lowest_layers_go_and_equal_ones_from_the_end() -> None:
    """The kept layers stay in order; of equal scores the earlier layer stays."""
    assert choose_layers(torch.tensor([0.5, 0.1, 0.9, 0.2]), 2) == (0, 2)
    assert choose_layers(torch.tensor([1.0, 1.0, 1.0]), 2) == (0, 1)


def test_one_of_the_needed_layers_stays() -> None:
    """A hybrid keeps its best full-attention layer in place of the worst that was kept."""
    assert choose_layers(torch.tensor([0.9, 0.1, 0.8, 0.2]), 2, one_of=(1, 3)) == (0, 3)
    assert choose_layers(torch.tensor([0.9, 0.7, 0.8, 0.2]), 2, one_of=(0, 3)) == (0, 2)


def test_neurons_with_the_highest_scores_stay() -> None:
    """Indices ascend, and the share of score mass they hold is reported."""
    scores = Scores(None, {"0.mlp": torch.tensor([3.0, 1.0, 4.0, 2.0])})
    kept = choose_highest(scores.neurons["0.mlp"], 2)
    assert kept.tolist() == [0, 2]
    assert kept_share(scores.neurons["0.mlp"], kept) == pytest.approx(0.7)
    assert kept_share(scores.neurons["0.mlp"], kept, adds_up=False) == pytest.approx(1 - 2 / 4)


def test_layers_of_a_tiny_model_differ() -> None:
    """And so do matrices of one shape within a layer; equal seeds still give equal weights."""
    one, same, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    matrices = [value for name, value in one.named_parameters() if name.endswith(("k_proj.weight", "v_proj.weight"))]
    matrices += [other.model.layers[0].self_attn.k_proj.weight]
    assert all(not torch.equal(first, second) for first, second in combinations(matrices, 2))


def test_cut_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    """JSON and safetensors together give the same cut again."""
    neurons = {"0.mlp": torch.tensor([1, 3]), "3.mlp.experts": torch.tensor([[0, 2], [1, 2]])}
    experts, heads = {"3.mlp.experts": torch.tensor([1])}, {"0.attention": torch.tensor([0, 2])}
    cut = Cut(4, (0, 1, 3), {"width": 2}, neurons, 1, experts, 2, heads)
    cut.save(tmp_path / "cut.json")
    loaded = Cut.load(tmp_path / "cut.json")
    assert (loaded.layers, loaded.removed, loaded.widths, loaded.num_experts) == ((0, 1, 3), (2,), {"width": 2}, 1)
    assert loaded.kv_groups == 2
    for before, after in ((neurons, loaded.neurons), (experts, loaded.experts), (heads, loaded.heads)):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_cut_of_other_sizes_than_the_recipe_says_is_refused() -> None:
    """Which heads stay is not edited by hand, and the recipe says how many."""
    heads = {"0.attention": torch.tensor([0, 2])}
    chosen = Cut(4, (0, 1, 2, 3), kv_groups=2, heads=heads)
    chosen.require_like(Cut(4, (0, 1, 3), kv_groups=2, heads=heads))
    with pytest.raises(RecipeError, match=r"kv_groups 1, and the recipe keeps .* kv_groups 2"):
        Cut(4, (0, 1, 2, 3), kv_groups=1, heads={"0.attention": torch.tensor([0])}).require_like(chosen)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (0, 4), (-1, 0)])
def test_impossible_cuts_are_refused(layers: tuple[int, ...]) -> None:
    """No layer, layers out of order, twice, or that the model has not."""
    with pytest.raises(RecipeError, match="keeps at least one of layers 0 to 3"):
        Cut(4, layers)


def test_gap_is_what_goes_between_kept_layers() -> None:
    """A kept layer's gap reaches to the next kept layer, or to the end."""
    assert [list(gap_after((1, 2, 5), position, num_layers=7)) for position in range(3)] == [[], [3, 4], [6]]


def test_refit_solves_the_formula() -> None:
    """The normal equations give the minimum of the ridge objective, solved here as one stacked least squares."""
    inputs_TF, inherited_TD = _normal(50, 6), _normal(50, 3, seed=2)
    lost_TD = inputs_TF @ _normal(6, 3, seed=3) + _normal(50, 3, seed=1)
    equations = Refit(ridge=0.3).open(folds=2)
    equations.update(inputs_TF[:20], lost_TD[:20], inherited_TD=inherited_TD[:20], fold=0)
    equations.update(inputs_TF[20:], lost_TD[20:], inherited_TD=inherited_TD[20:], fold=1)
    strength = (0.3 * inputs_TF.square().sum(0).mean()).sqrt()
    stacked = torch.cat([inputs_TF, strength * torch.eye(6)])
    solved = equations.solve()
    assert solved.ridge == 0.3
    wanted = torch.cat([lost_TD + solved.inherited * inherited_TD, torch.zeros(6, 3)])
    expected = torch.linalg.lstsq(stacked, wanted).solution
    torch.testing.assert_close(solved.delta_DF, expected.T, rtol=1e-4, atol=1e-5)


def _cross_validated(
    lost_TD: torch.Tensor, inherited_TD: torch.Tensor, inputs_TF: torch.Tensor, ridge: float | None = None
) -> Repair:
    equations = Refit(ridge=ridge).open(folds=3)
    for fold, rows in enumerate(torch.arange(len(inputs_TF)).chunk(3)):
        equations.update(inputs_TF[rows], lost_TD[rows], inherited_TD=inherited_TD[rows], fold=fold)
    return equations.solve()


def test_refit_finds_what_the_inputs_explain() -> None:
    """An error that is linear in the inputs is made good, and the held-out error says so."""
    inputs_TF, weight_FD = _normal(300, 8), _normal(8, 4, seed=1)
    repair = _cross_validated(inputs_TF @ weight_FD, torch.zeros(300, 4), inputs_TF)
    torch.testing.assert_close(repair.delta_DF, weight_FD.T, rtol=0.05, atol=0.05)
    assert repair.held_out is not None
    assert repair.held_out < -0.99


@pytest.mark.parametrize("ridge", [None, 1e-3, 1.0])
def test_refit_of_noise_is_left_out(ridge: float | None) -> None:
    """Where no solve helps on text that it did not see, there is none, at a ridge that is given neither."""
    repair = _cross_validated(_normal(60, 4, seed=1), _normal(60, 4, seed=2), _normal(60, 12), ridge)
    assert repair.delta_DF is None
    assert repair.ridge is None


def test_inherited_noise_is_left_out() -> None:
    """Earlier layers' errors that the inputs do not explain do not disturb the rest of the repair."""
    inputs_TF, weight_FD, noise_TD = _normal(200, 12), _normal(12, 4, seed=1), 20 * _normal(200, 4, seed=2)
    repair = _cross_validated(inputs_TF @ weight_FD, noise_TD, inputs_TF)
    assert repair.inherited < 0.2
    together = Refit(ridge=0.01).open(folds=1)
    together.update(inputs_TF, inputs_TF @ weight_FD, inherited_TD=noise_TD)
    naive_DF = together.solve().delta_DF
    assert repair.delta_DF is not None
    assert naive_DF is not None
    assert (repair.delta_DF - weight_FD.T).norm() < 0.6 * (naive_DF - weight_FD.T).norm()


def test_sketch_stands_for_all_outputs() -> None:
    """With more outputs than are sketched, the choice is that of all of them within a few percent."""
    inputs_TF, weight_FD = _normal(300, 8), _normal(8, 512, seed=1)
    repair = _cross_validated(inputs_TF @ weight_FD + 2 * _normal(300, 512, seed=3), torch.zeros(300, 512), inputs_TF)
    assert repair.held_out is not None
    explained = 8 / (8 + 4)  # of the squared error; a little of that is lost to what noise does to the solve
    assert -explained - 0.05 < repair.held_out < -0.8 * explained


def test_refit_of_no_error_is_nothing() -> None:
    """Where the pruned stream is right already, the weights stay as they are."""
    equations = Refit().open(folds=2)
    equations.update(_normal(40, 5), None, inherited_TD=torch.zeros(40, 2), fold=0)
    equations.update(_normal(40, 5, seed=1), None, inherited_TD=torch.zeros(40, 2), fold=1)
    delta_DF = equations.solve().delta_DF
    assert delta_DF is None or not delta_DF.any()


def test_one_window_cannot_be_held_out() -> None:
    """With a single fold the repair is done at a middling strength, and says that nothing was held out."""
    equations = Refit().open(folds=1)
    equations.update(_normal(40, 5), None, inherited_TD=_normal(40, 2))
    repair = equations.solve()
    assert repair.held_out is None
    assert repair.delta_DF is not None


def test_refit_without_enough_tokens_says_so() -> None:
    """Fewer tokens than inputs and no ridge have no unique solution: an error with the remedy."""
    equations = Refit(ridge=0).open(folds=1)
    equations.update(torch.ones(3, 5), None, inherited_TD=torch.ones(3, 2))
    with pytest.raises(NumericalError, match=r"raise refit\.ridge or calibration\.samples"):
        equations.solve()


def _scaled_folds(scales: Sequence[float]) -> NormalEquations:
    """Two folds of 200 tokens whose inputs have these scales, and an error that they explain."""
    equations = Refit().open(folds=2)
    for fold in range(2):
        inputs_TF = _normal(200, len(scales), seed=fold) * torch.tensor(scales)
        equations.update(
            inputs_TF, None, inherited_TD=_normal(200, 1, seed=9) * 0.1 + inputs_TF[:, :1] / scales[0], fold=fold
        )
    return equations


@pytest.mark.parametrize("failing", [(1.0,), (1.0, 3.0), (0.3,)])
def test_a_ridge_without_a_stable_solution_is_a_failed_trial(
    monkeypatch: pytest.MonkeyPatch, failing: tuple[float, ...]
) -> None:
    """The first, several, or a weaker ridge may not be positive definite: one that is gets chosen."""
    real = normal_equations._ridge
    monkeypatch.setattr(
        normal_equations, "_ridge", lambda *given, ridge: None if ridge <= max(failing) else real(*given, ridge=ridge)
    )
    repair = _scaled_folds((1.0, 2.0, 3.0)).solve("layer 3, mlp.down_proj")
    assert repair.ridge is not None
    assert repair.ridge > max(failing)
    assert repair.held_out is not None
    assert repair.held_out < 0
    assert repair.delta_DF is not None


def test_a_solve_over_all_text_that_fails_takes_a_stronger_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing could be held out."""
    real = normal_equations._ridge
    monkeypatch.setattr(
        normal_equations, "_ridge", lambda *given, ridge: None if ridge < 3.0 else real(*given, ridge=ridge)
    )
    equations = Refit().open(folds=1)
    equations.update(_normal(40, 5), None, inherited_TD=_normal(40, 2))
    assert equations.solve().ridge == 3.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("fold", [0, 1])
def test_a_refit_without_any_stable_solution_says_where(fold: int, value: float) -> None:
    """NaN or infinity in either fold fails every ridge: an error that names the projection and the remedy."""
    equations = _scaled_folds((1.0, 2.0, 3.0))
    equations._folds[fold].gram_FF[0, 0] = value
    with pytest.raises(NumericalError, match=r"refit of layer 3, mlp.down_proj has no stable .* any ridge up to 10"):
        equations.solve("layer 3, mlp.down_proj")


def test_a_factor_that_is_not_a_number_is_none() -> None:
    """Where all hidden states are zero nobody can say how much of a projection reaches them."""
    model = tiny_model("llama")
    windows_NL = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    walk = LayerwiseForward(dense_decoder(model), windows_NL, batch_size=2)
    layer = model.model.layers[0]
    assert residual_scale(walk, 0, layer=layer, output=layer.mlp.down_proj) == 1.0
    walk.streams[0] = torch.zeros_like(walk.streams[0])
    assert residual_scale(walk, 0, layer=layer, output=layer.mlp.down_proj) is None


def test_folds_are_sources_or_halves() -> None:
    """Windows of one source are held out together; of a single source, the first half and the second."""
    assert folds_of(4, None).tolist() == [0, 0, 1, 1]
    assert folds_of(4, torch.zeros(4, dtype=torch.int64)).tolist() == [0, 0, 1, 1]
    assert folds_of(4, torch.tensor([2, 0, 1, 0])).tolist() == [2, 0, 1, 0]


def test_folds_take_memory_that_the_plan_knows() -> None:
    """Two at least and four at most, also where the ridge is given."""
    assert [Refit().folds(sources) for sources in (0, 1, 3, 9)] == [2, 2, 3, 4]
    assert Refit(ridge=0.1).folds(3) == 3


def test_what_half_the_text_asks_for_is_too_careful_for_all_of_it() -> None:
    """Ridge and share are found with one fold left out; with the whole text the noise is as much less as it is more."""
    found = Repair(None, 1.0, 0.5, -0.1)
    for_all = for_all_folds(found, 2)
    assert (for_all.ridge, for_all.inherited) == (0.5, pytest.approx(2 / 3))
    assert for_all_folds(Repair(None, 1.0, 1.0, -0.1), 4).inherited == 1.0
    assert for_all_folds(Repair(None, 1.0, 0.0, -0.1), 4) == Repair(None, 0.75, 0.0, -0.1)
    assert for_all_folds(found, 1) == found
