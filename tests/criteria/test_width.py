"""What every width criterion keeps to, and what each one is. A new one is tested by being in the union.

Shapes: T tokens, B batch, L sequence length, D hidden size, F neurons.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.scored import IDS, recipe_of, scores_of
from helpers.tiny import structure_of
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hooks import inputs_of
from llmprune.anatomy.selection import neuron_rows
from llmprune.anatomy.types import PrunableDim, unit_key
from llmprune.checkpoint.loading import dense_decoder
from llmprune.common.errors import NumericalError, RecipeError
from llmprune.criteria import Activation, AnyWidthCriterion, Flap, Magnitude, Obs, Share, Taylor, Wanda
from llmprune.criteria.base import UnitAccumulator, WidthCriterion
from llmprune.criteria.width.obs_accumulator import group_order, removal_order
from llmprune.layerwise.decoder import Decoder
from llmprune.recipe.refit import Refit
from llmprune.score.forward_pass import score
from llmprune.testing import tiny_model

WINDOWS, LENGTH, HIDDEN, NEURONS = 6, 10, 5, 8
KINDS = {section.model_fields["kind"].default: section for section in get_args(AnyWidthCriterion)}
BY_TEXT = [kind for kind in KINDS if kind != "magnitude"]

every_kind = pytest.mark.parametrize("kind", KINDS)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Unit:
    """Weights of a gated unit, its neurons' activations, and the gradient of a loss after its output projection."""

    def __init__(self) -> None:
        self.inputs = [_normal(NEURONS, HIDDEN, seed=1), _normal(NEURONS, HIDDEN, seed=2), _normal(NEURONS, seed=3)]
        self.output_DF = _normal(HIDDEN, NEURONS, seed=4)
        mixed_FF = _normal(NEURONS, NEURONS, seed=5)
        self.activation_BLF = (_normal(WINDOWS, LENGTH, NEURONS, seed=6) + 0.5) @ mixed_FF
        self.gradient_BLD = _normal(WINDOWS, LENGTH, HIDDEN, seed=7)

    def neurons(self, order_F: Tensor) -> Unit:
        """The same unit with its neurons in another order."""
        self.inputs = [rows[order_F] for rows in self.inputs]
        self.output_DF = self.output_DF[:, order_F]
        self.activation_BLF = self.activation_BLF[..., order_F]
        return self

    def open(self, criterion: WidthCriterion, windows: slice, batch: int = 2) -> UnitAccumulator:
        """Sums of the criterion over some windows."""
        accumulator = criterion.open(self.output_DF, self.inputs)
        values_BLF = self.activation_BLF
        if criterion.takes != "activations":
            values_BLF = values_BLF * (self.gradient_BLD @ self.output_DF)
        for values in values_BLF[windows].split(batch):
            accumulator.update(values)
        return accumulator

    def scores(self, criterion: WidthCriterion, batch: int = 2) -> Tensor:
        """Scores by all windows."""
        return self.open(criterion, slice(None), batch).scores()


@every_kind
def test_scores_are_finite_and_one_a_neuron(kind: str) -> None:
    """Float32 [F], none below zero, and not all the same."""
    scores_F = Unit().scores(KINDS[kind]())
    assert (scores_F.shape, scores_F.dtype) == ((NEURONS,), torch.float32)
    assert scores_F.isfinite().all()
    assert scores_F.min() >= 0
    assert scores_F.unique().numel() == NEURONS


@every_kind
def test_half_precision_is_summed_in_more(kind: str) -> None:
    """Weights and activations in bfloat16 give the scores of the same numbers in float32.

    But for a product that is rounded as the layer's own is.
    """
    half, full = Unit(), Unit()
    for unit, dtype in ((half, torch.bfloat16), (full, torch.float32)):
        unit.output_DF = unit.output_DF.bfloat16().to(dtype)
        unit.inputs = [rows.bfloat16().to(dtype) for rows in unit.inputs]
        unit.activation_BLF = unit.activation_BLF.bfloat16().to(dtype)
        unit.gradient_BLD = unit.gradient_BLD.bfloat16().to(dtype)
    if KINDS[kind].takes != "activations":  # a product of two, which the walk back takes in float32
        half = full
    rounding = {"rtol": 2**-8, "atol": 0} if kind == "share" else {}
    torch.testing.assert_close(half.scores(KINDS[kind]()), full.scores(KINDS[kind]()), **rounding)


@every_kind
def test_scores_do_not_depend_on_the_batch_size(kind: str) -> None:
    """Windows one by one or all at once are scored alike."""
    one, all_at_once = (Unit().scores(KINDS[kind](), batch) for batch in (1, WINDOWS))
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-6)


@every_kind
def test_sums_of_two_halves_are_those_of_the_whole(kind: str) -> None:
    """Two processes that add up their sums, each with half the windows, score what one does."""
    unit, criterion = Unit(), KINDS[kind]()
    first, second = (unit.open(criterion, windows) for windows in (slice(0, 2), slice(2, None)))
    for own, other in zip(first.sums(), second.sums(), strict=True):
        own += other
    torch.testing.assert_close(first.scores(), unit.scores(criterion), rtol=1e-4, atol=1e-6)


@every_kind
def test_permuted_neurons_have_permuted_scores(kind: str) -> None:
    """The order of the neurons does not matter."""
    order_F = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))
    scores_F = Unit().scores(KINDS[kind]())
    torch.testing.assert_close(Unit().neurons(order_F).scores(KINDS[kind]()), scores_F[order_F], rtol=1e-4, atol=1e-6)


@every_kind
def test_a_neuron_without_weights_scores_lowest(kind: str) -> None:
    """What neither reads nor writes goes first."""
    unit = Unit()
    unit.output_DF[:, 3] = 0
    unit.activation_BLF[..., 3] = 0
    for rows in unit.inputs:
        rows[3] = 0
    assert int(unit.scores(KINDS[kind]()).argmin()) == 3


@pytest.mark.parametrize("kind", BY_TEXT)
@pytest.mark.parametrize("silent", [True, False])
def test_a_neuron_that_adds_nothing_scores_lowest(kind: str, silent: bool) -> None:
    """One that never fires, and one whose output column is zero, go first whatever their other weights are."""
    unit = Unit()
    if silent:
        unit.activation_BLF[..., 3] = 0
    else:
        unit.output_DF[:, 3] = 0
    scores_F = unit.scores(KINDS[kind]())
    assert int(scores_F.argmin()) == 3
    assert scores_F[3] <= 1e-6 * scores_F.max()


@every_kind
def test_a_kind_is_read_from_a_recipe(kind: str) -> None:
    """``width.criterion.kind`` picks the section, and its text says what it is."""
    recipe = recipe_of("llama", {"mlp": 0.5, "criterion": {"kind": kind}})
    assert recipe.width is not None
    assert type(recipe.width.criterion) is KINDS[kind]


def test_an_unknown_kind_names_the_nearest() -> None:
    """A misspelt kind is answered with all of them and the nearest."""
    with pytest.raises(RecipeError, match=r"not 'tailor'; did you mean 'taylor'\?"):
        recipe_of("llama", {"mlp": 0.5, "criterion": {"kind": "tailor"}})


def test_magnitude_is_the_norm_of_all_weights_of_a_neuron() -> None:
    """Rows of gate and up, the bias and the output column count together."""
    unit = Unit()
    together_FI = torch.cat([*(rows.reshape(NEURONS, -1) for rows in unit.inputs), unit.output_DF.T], dim=1)
    torch.testing.assert_close(unit.scores(Magnitude()), together_FI.norm(dim=1))


def test_wanda_adds_up_the_importance_of_single_weights() -> None:
    """|w_df| times the root of the mean square of x_f, summed over d."""
    unit = Unit()
    activation_TF = unit.activation_BLF.flatten(0, 1)
    single_DF = unit.output_DF.abs() * activation_TF.square().mean(0).sqrt()
    torch.testing.assert_close(unit.scores(Wanda()), single_DF.sum(0))


def test_share_is_what_a_neuron_writes_of_what_its_token_gets() -> None:
    """Squared norms times the cosine, a mean over tokens; how loud a token is makes no difference."""
    unit = Unit()
    activation_TF = unit.activation_BLF.flatten(0, 1)
    written_TDF = activation_TF[:, None, :] * unit.output_DF
    all_TD1 = written_TDF.sum(2, keepdim=True)
    cosine_TF = torch.cosine_similarity(written_TDF, all_TD1, dim=1).abs()
    wanted_F = (written_TDF.square().sum(1) / all_TD1.square().sum(1) * cosine_TF).mean(0)
    torch.testing.assert_close(unit.scores(Share()), wanted_F)
    unit.activation_BLF[3] *= 1000
    torch.testing.assert_close(unit.scores(Share()), wanted_F)


def test_a_bias_of_the_output_projection_is_no_share(tmp_path: Path) -> None:
    """What a neuron writes is compared with what neurons write, whatever the module adds to it."""
    model = tiny_model("gpt2")
    mlp = model.transformer.h[0].mlp
    seen: list[Tensor] = []
    with inputs_of(mlp.c_proj, seen.append), torch.no_grad():
        model(IDS)
    mlp.c_proj.bias.data.fill_(100)
    accumulator = Share().open(mlp.c_proj.weight.T)
    accumulator.update(seen[0])
    torch.testing.assert_close(scores_of(model, Share(), tmp_path)["0.mlp"], accumulator.scores(), rtol=1e-3, atol=0)


def test_sums_go_with_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one layer, which may hold its weights, are gone before the next layer comes."""
    model = tiny_model("llama")
    opened: list[weakref.ref[UnitAccumulator]] = []
    left: list[int] = []
    own = Share.open

    def watched(self: Share, output_DF: Tensor, inputs: Sequence[Tensor] = ()) -> UnitAccumulator:
        sums = own(self, output_DF, inputs)
        opened.append(weakref.ref(sums))
        return sums

    monkeypatch.setattr(Share, "open", watched)
    dense = dense_decoder(model)

    def fetch(index: int) -> dict[str, Tensor]:
        left.append(sum(sums() is not None for sums in opened))
        return dict(dense.tensors(index))

    decoder = Decoder(dense.skeleton, fetch, device_of=dense.device_of)
    score(decoder, discover(model.config), windows_NL=IDS, batch_size=2, depth=None, width=Share())
    assert len(opened) == 4
    assert not any(left)


def test_tokens_that_get_nothing_give_no_share() -> None:
    """They count as tokens, and divide nothing by nothing."""
    unit = Unit()
    whole_F = unit.scores(Share())
    unit.activation_BLF[: WINDOWS // 2] = 0
    unit.activation_BLF[WINDOWS // 2 :] = Unit().activation_BLF[: WINDOWS // 2]
    half_F = unit.open(Share(), slice(WINDOWS // 2, None)).scores()
    assert torch.isfinite(whole_F).all()
    torch.testing.assert_close(unit.scores(Share()), half_F / 2)


def test_flap_is_the_variance_of_what_a_neuron_writes() -> None:
    """Variance over all tokens of the neuron's contribution, summed over outputs."""
    unit = Unit()
    written_TDF = unit.activation_BLF.flatten(0, 1)[:, None, :] * unit.output_DF
    torch.testing.assert_close(unit.scores(Flap()), written_TDF.var(0, correction=0).sum(0))


def test_flap_sees_a_small_variance_beside_a_large_mean() -> None:
    """A mean a thousand times the deviation, and batches of different means, leave the variance exact."""
    values_TF = 1000 + _normal(4096, 3)
    values_TF[2048:] += 2
    accumulator = Flap().open(torch.ones(1, 3))
    for part_TF in values_TF.split(100):
        accumulator.update(part_TF)
    torch.testing.assert_close(accumulator.scores(), values_TF.double().var(0, correction=0).float())


@pytest.mark.parametrize("absolute", ["token", "window", "all"])
def test_taylor_drops_signs_where_it_says(absolute: str) -> None:
    """Effects cancel out within tokens, windows or all of it, and not beyond."""
    effect_BLF = _normal(WINDOWS, LENGTH, NEURONS)
    accumulator = Taylor.model_validate({"absolute": absolute}).open(torch.ones(HIDDEN, NEURONS))
    for part in effect_BLF.split(4):
        accumulator.update(part)
    wanted_F = {
        "token": effect_BLF.abs().sum((0, 1)),
        "window": effect_BLF.sum(1).abs().sum(0),
        "all": effect_BLF.sum((0, 1)).abs(),
    }[absolute]
    torch.testing.assert_close(accumulator.scores(), wanted_F / (WINDOWS * LENGTH))


def _error_without(gram_FF: Tensor, weight_DF: Tensor, pull: float, gone: Sequence[int]) -> float:
    """The error of the output with these neurons gone and the others' weights solved again."""
    left = [neuron for neuron in range(len(gram_FF)) if neuron not in gone]
    lost_DK = weight_DF[:, list(gone)]
    moment_FD = gram_FF[left][:, list(gone)] @ lost_DK.T
    solved_FD = torch.linalg.solve(gram_FF[left][:, left] + pull * torch.eye(len(left)).double(), moment_FD)
    energy = (lost_DK @ gram_FF[list(gone)][:, list(gone)] * lost_DK).sum()
    return float(energy - (solved_FD * moment_FD).sum())


@pytest.mark.parametrize(
    ("size", "order"),
    [
        *((1, partial(removal_order, together=together)) for together in (1, 3, 64)),
        (3, partial(group_order, size=3)),
    ],
    ids=["one by one", "in threes", "at once", "groups"],
)
def test_obs_is_greedy_removal_with_everything_solved_again(size: int, order: Callable[..., Any]) -> None:
    """Order and errors are those of trying every neuron, or every group of three, and solving all others again,
    whatever the blocks are.
    """
    width, ridge = 12, 0.3
    input_TF = _normal(40, width, seed=1).double() @ _normal(width, width, seed=2).double()
    weight_DF, gram_FF = _normal(HIDDEN, width, seed=3).double(), input_TF.T @ input_TF
    pull = ridge * float(gram_FF.diagonal().mean())
    gone: list[int] = []
    errors = []
    while len(gone) < width // size:
        trials = {
            group: _error_without(
                gram_FF, weight_DF, pull, [size * each + place for each in [*gone, group] for place in range(size)]
            )
            for group in range(width // size)
            if group not in gone
        }
        gone.append(min(trials, key=trials.__getitem__))
        errors.append(trials[gone[-1]])
    found, found_errors = order(gram_FF.clone(), weight_DF, ridge)
    assert found.tolist() == gone
    torch.testing.assert_close(found_errors, torch.tensor(errors, dtype=torch.float64))


def test_a_group_of_one_input_is_a_neuron() -> None:
    """Group by group or neuron by neuron, the scores are the same."""
    unit = Unit()
    grouped_F = unit.open(Obs(), slice(None)).group_scores(1)
    torch.testing.assert_close(grouped_F, unit.scores(Obs()), rtol=1e-4, atol=1e-6)


def test_one_loud_input_among_silent_ones_is_worth_less_than_many() -> None:
    """Of two groups without correlations that goes which writes less in all, however its inputs are ordered."""
    values_TF = torch.zeros(16, 16)
    values_TF[range(16), range(16)] = torch.tensor([3.2] + [0.01] * 7 + [1.0] * 8) * 4
    sums = Obs(ridge=1e-3).open(torch.eye(16))
    sums.update(values_TF)
    loud, many = sums.group_scores(8).tolist()
    assert many < loud


def test_obs_scores_end_with_all_that_is_written() -> None:
    """The last neuron's score is the mean energy of the whole output, for then nothing is left."""
    unit = Unit()
    output_TD = unit.activation_BLF.flatten(0, 1) @ unit.output_DF.T
    torch.testing.assert_close(unit.scores(Obs()).max(), output_TD.square().sum(1).mean(), rtol=1e-4, atol=0)


def test_obs_counts_twins_once() -> None:
    """Of two neurons that do the same one costs little; by their activations alone both cost much."""
    unit = Unit()
    unit.activation_BLF[..., 3] = unit.activation_BLF[..., 5] = 10 * unit.activation_BLF[..., 5]
    assert int(unit.scores(Obs(ridge=1e-4)).argmin()) in (3, 5)
    assert int(unit.scores(Activation()).argmin()) not in (3, 5)


def test_obs_without_correlations_is_the_activation_criterion() -> None:
    """With all correlations shrunk away, scores are the energies of single neurons, added up from the least."""
    unit = Unit()
    energy_F, order_F = unit.scores(Activation()).sort()
    torch.testing.assert_close(unit.scores(Obs(shrinkage=1.0))[order_F], energy_F.cumsum(0), rtol=1e-4, atol=1e-5)


def test_obs_says_what_is_no_gram_matrix() -> None:
    """NaN among the activations ends it with a sentence."""
    with pytest.raises(NumericalError, match=r"raise width\.criterion\.ridge or calibration\.samples"):
        removal_order(torch.full((3, 3), torch.nan).double(), torch.ones(2, 3).double(), ridge=1.0)


@pytest.mark.parametrize("order", [removal_order, partial(group_order, size=1)], ids=["neurons", "groups"])
def test_obs_chooses_nothing_by_costs_that_are_not_finite(order: Callable[..., Any]) -> None:
    """Infinite sums or weights end it with the same sentence, and never with an order."""
    for value in (torch.inf, 1e300):
        gram_FF, weight_DF = torch.eye(3).double(), torch.ones(2, 3).double()
        gram_FF[1, 1], weight_DF[0, 2] = value, 1e200
        with pytest.raises(NumericalError, match=r"obs finds no order"):
            order(gram_FF, weight_DF, 1.0)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [((1, 1), [[0, 2], [1, 3]]), ((2,), [[0, 1], [2, 3]]), ((1,), [[0], [1], [2], [3]])],
    ids=["chunked", "interleaved", "plain"],
)
def test_rows_of_a_fused_tensor_hold_gate_and_up(parts: tuple[int, ...], wanted: list[Any]) -> None:
    """Whichever dimension and layout, a row has all that is one neuron's."""
    tensor = torch.arange(4)
    assert neuron_rows(tensor, PrunableDim("bias", 0, parts)).tolist() == wanted
    sideways = neuron_rows(tensor.expand(3, 4), PrunableDim("weight", 1, parts))
    assert sideways[..., 0].tolist() == wanted
    assert sideways.shape[-1] == 3


@pytest.mark.parametrize("kind", ["flap", "magnitude", "share", "wanda"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_scored_as_if_each_were_a_unit(tmp_path: Path, kind: str, family: str) -> None:
    """Stacked experts get scores of their own [E, F] by whatever needs no solve and no gradients."""
    for scores_EF in scores_of(tiny_model(family), KINDS[kind](), tmp_path).values():
        assert scores_EF.ndim == 2
        assert scores_EF.unique(dim=0).shape == scores_EF.shape
        assert scores_EF.min() > 0


def test_magnitude_of_stacked_experts_is_that_of_their_tensors(tmp_path: Path) -> None:
    """Fused gate and up, and down, of each expert count together."""
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
    wanted_EF = torch.cat([gate_EFD, up_EFD, experts.down_proj.transpose(1, 2)], dim=2).norm(dim=2)
    torch.testing.assert_close(scores_of(model, Magnitude(), tmp_path)[unit_key(1, "mlp.experts")], wanted_EF)


@pytest.mark.parametrize(("kind", "reason"), [("obs", "cut without"), ("taylor", "gradients are not watched")])
def test_routed_experts_are_refused_where_a_criterion_cannot_score_them(tmp_path: Path, kind: str, reason: str) -> None:
    """The plan says why and what else to do; units that every token goes through are scored all the same."""
    model = tiny_model("qwen2_moe")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=rf"{kind} cannot score.*moe_intermediate_size.*{reason}.*width\.neurons"):
        structure_of(recipe_of(tmp_path, {"mlp": 0.5, "criterion": {"kind": kind}}))
    named = {"neurons": {"shared_expert_intermediate_size": 32}, "criterion": {"kind": kind}}
    assert any(f"width.criterion {kind}" in note for note in structure_of(recipe_of(tmp_path, named)).notes)
    assert {key.partition(".")[2] for key in scores_of(model, KINDS[kind](), tmp_path)} == {"mlp.shared_expert"}


def test_the_plan_counts_the_memory_of_a_solve(tmp_path: Path) -> None:
    """Matrices of the dense width in float64 take more than the refit of the kept ones."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    memory = [
        structure_of(recipe_of(tmp_path, {"neurons": 32, "criterion": {"kind": kind}})).memory.statistics
        for kind in ("activation", "obs")
    ]
    assert memory[0] < memory[1] == Obs().memory(96)


def test_the_plan_counts_what_a_refit_keeps_of_all_windows(tmp_path: Path) -> None:
    """Outputs of the dense model's mixer and, where a norm may follow it, of its MLP: two streams more."""
    tiny_model("gemma2").config.save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, {"neurons": 32})
    kept = [
        structure_of(recipe.model_copy(update={"refit": refit})).memory.streams for refit in (None, Refit(up=False))
    ]
    assert kept[1] - kept[0] == 2 * 2 * 24 * 32 * 4  # streams, windows, tokens, hidden size, bytes


def test_the_plan_says_what_a_criterion_costs_and_misses(tmp_path: Path) -> None:
    """A slower criterion has a note, and so has one whose scores count on a repair that is off."""
    tiny_model("llama").config.save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path, {"mlp": 0.5, "criterion": {"kind": "obs"}})
    notes = structure_of(recipe.model_copy(update={"refit": None})).notes
    assert [note.split(": ")[0] for note in notes if "criterion" in note] == [
        "width.criterion obs solves for every neuron of a layer, time by the cube of the width",
        "width.criterion obs assumes the refit, which is off",
    ]
    assert not any("criterion" in note for note in structure_of(recipe_of(tmp_path, {"mlp": 0.5})).notes)


def test_removal_errors_rise() -> None:
    """Each removal leaves at least the error of those before it."""
    scores = Unit().scores(Obs()).sort().values.tolist()
    assert all(before <= after for before, after in pairwise(scores))
