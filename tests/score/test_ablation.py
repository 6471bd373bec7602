"""Depth criteria that look at more than one layer: blocks of layers, and trials without a layer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import structure_of
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.checkpoint.loading import dense_decoder
from llmprune.common.errors import CalibrationError, NumericalError
from llmprune.criteria.base import DepthCriterion, TrialCriterion
from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.depth.repaired_divergence import Residual
from llmprune.cut.decision import choose_layers
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.hidden_states import HiddenStateStore
from llmprune.planning.plan import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.score import ablation_repair as standins
from llmprune.score.ablation import layer_ablation_scores, some_windows
from llmprune.score.forward_pass import score
from llmprune.testing import tiny_model

LAYERS = 5


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A small random model whose layers matter differently."""
    made = tiny_model("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for index, layer in enumerate(made.model.layers):
            layer.mlp.down_proj.weight.mul_(1 + 4 * ((index * 2) % LAYERS))
    return made


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Token windows [N, L]."""
    return torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(3))


def logits_without(model: PreTrainedModel, gone: set[int], windows_NL: Tensor) -> Tensor:
    """What transformers' own forward says when layers are taken out of the list."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(layer for index, layer in enumerate(layers) if index not in gone)
    model.config.num_hidden_layers = len(model.model.layers)
    try:
        with torch.no_grad():
            return model(input_ids=windows_NL, use_cache=False).logits
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)


def mean_cost(criterion: TrialCriterion, model: PreTrainedModel, gone: set[int], windows_NL: Tensor) -> float:
    """By how much the criterion's mean cost grows, by whole forward passes."""
    dense_NLV, other_NLV = (logits_without(model, without, windows_NL) for without in (set[int](), gone))
    cost, own = (
        criterion.cost(logits_NLV, dense_NLV, ids_BL=windows_NL).mean() for logits_NLV in (other_NLV, dense_NLV)
    )
    return float(cost - own)


@pytest.mark.parametrize("kind", [Perplexity, Divergence])
def test_one_shot_trials_equal_whole_forward_passes(
    kind: type[TrialCriterion], model: PreTrainedModel, windows: Tensor
) -> None:
    """Variants that share the dense prefix cost what models without the layer cost, whatever the batches."""
    criterion = kind(windows=4, greedy=False)
    scores_N = layer_ablation_scores(
        dense_decoder(model), discover(model.config), criterion=criterion, windows_NL=windows, batch_size=3, remove=2
    )
    judged, rest = some_windows(windows, 4)
    assert len(rest) == 2
    expected = [mean_cost(criterion, model, {layer}, judged) for layer in range(LAYERS)]
    torch.testing.assert_close(scores_N, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Perplexity, Divergence])
def test_greedy_trials_choose_one_layer_after_the_other(
    kind: type[TrialCriterion], model: PreTrainedModel, windows: Tensor
) -> None:
    """Each round takes the layer whose loss, beside those gone already, costs least, be it less than they."""
    criterion = kind(windows=6)
    scores_N = layer_ablation_scores(
        dense_decoder(model), discover(model.config), criterion=criterion, windows_NL=windows, batch_size=2, remove=3
    )
    gone: set[int] = set()
    for _ in range(3):
        free = [layer for layer in range(LAYERS) if layer not in gone]
        gone.add(min(free, key=lambda layer: mean_cost(criterion, model, gone | {layer}, windows)))
    assert set(choose_layers(scores_N, LAYERS - 3)) == set(range(LAYERS)) - gone
    if kind is Divergence:
        assert float(scores_N[list(gone)].max()) == pytest.approx(mean_cost(criterion, model, gone, windows), rel=1e-3)


def test_a_layer_that_gets_cheaper_by_the_loss_of_another_goes_after_it() -> None:
    """Scores rise in the order of removal, and those of all that stay are above them."""
    costs = iter([{0: 3.0, 1: 1.0, 2: 2.0, 3: 2.5}, {0: 0.5, 2: 0.7, 3: 0.6}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.score.ablation._Trials.round", lambda *_: next(costs))
        dense = dense_decoder(tiny_model("llama", num_hidden_layers=4))
        ids_NL = torch.zeros(2, 4, dtype=torch.int64)
        scores_N = layer_ablation_scores(
            dense,
            discover(tiny_model("llama").config),
            criterion=Divergence(),
            windows_NL=ids_NL,
            batch_size=2,
            remove=2,
        )
    assert choose_layers(scores_N, 2) == (2, 3)


def _tried(criterion: TrialCriterion, *rounds: dict[int, float]) -> Tensor:
    """Scores of four layers whose trials cost this, round by round."""
    costs = iter(rounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.score.ablation._Trials.round", lambda *_: next(costs))
        dense, anatomy = dense_decoder(tiny_model("llama", num_hidden_layers=4)), discover(tiny_model("llama").config)
        ids_NL = torch.zeros(2, 4, dtype=torch.int64)
        return layer_ablation_scores(
            dense, anatomy, criterion=criterion, windows_NL=ids_NL, batch_size=2, remove=len(rounds)
        )


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_a_layer_without_a_finite_cost_is_never_chosen(cost: float) -> None:
    """It stays, and unless a later round finds its cost, the run ends with its number and the criterion."""
    scores_N = _tried(Divergence(), {0: cost, 1: 2.0, 2: 1.0, 3: 3.0}, {0: 5.0, 1: 2.0, 3: 3.0})
    assert choose_layers(scores_N, 2) == (0, 3)
    with pytest.raises(NumericalError, match=r"criterion divergence: the cost of the model without layer 0 is not"):
        _tried(Divergence(), {0: cost, 1: 2.0, 2: 1.0, 3: 3.0})


def test_no_finite_cost_at_all_names_the_layers_and_the_criterion() -> None:
    """Where no layer can be chosen, nothing is."""
    with pytest.raises(NumericalError, match=r"criterion perplexity: .* without any of layers 0–3 is not finite"):
        _tried(Perplexity(), dict.fromkeys(range(4), math.nan))


def test_trials_leave_one_of_the_needed_layers(model: PreTrainedModel, windows: Tensor) -> None:
    """The last layer of a kind that must not die out is never tried."""
    anatomy = replace(discover(model.config), one_of=(1, 4))
    scores_N = layer_ablation_scores(
        dense_decoder(model),
        anatomy,
        criterion=Perplexity(windows=2),
        windows_NL=windows,
        batch_size=2,
        remove=LAYERS - 1,
    )
    assert torch.isfinite(scores_N).all()
    assert {1, 4} & set(choose_layers(scores_N, 1, one_of=(1, 4)))


def test_the_dense_model_costs_what_its_text_does(model: PreTrainedModel, windows: Tensor) -> None:
    """The divergence of a model from itself is 0, its cross entropy that of the text."""
    dense_NLV = logits_without(model, set(), windows)
    assert float(Divergence().cost(dense_NLV, dense_NLV, ids_BL=windows).abs().max()) < 1e-5
    expected = nn.functional.cross_entropy(dense_NLV[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    torch.testing.assert_close(Perplexity().cost(dense_NLV, dense_NLV, ids_BL=windows).mean(), expected)


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_angular_removes_the_block_that_turns_least(tokens: str, model: PreTrainedModel, windows: Tensor) -> None:
    """The layers that go are the neighbours between which the angle is smallest."""
    hidden = model(input_ids=windows, output_hidden_states=True, use_cache=False).hidden_states
    criterion = Angular(tokens=tokens)
    chosen = slice(-1, None) if tokens == "last" else slice(None)

    def distance(start: int, end: int) -> float:
        if end == LAYERS:  # the model hands out its last state after the final norm
            return math.inf
        cosine = nn.functional.cosine_similarity(hidden[start][:, chosen], hidden[end][:, chosen], dim=-1)
        return float((cosine.clamp(-1, 1).acos() / math.pi).mean())

    scores = score(
        dense_decoder(model),
        discover(model.config),
        windows_NL=windows,
        batch_size=4,
        depth=criterion,
        width=None,
        remove=2,
    )
    assert scores.layers is not None
    found = [distance(start, start + 2) for start in range(LAYERS - 1)]
    best = min(range(LAYERS - 1), key=found.__getitem__)
    kept = choose_layers(scores.layers, LAYERS - 2)
    removed = sorted(set(range(LAYERS)) - set(kept))
    assert removed[1] == removed[0] + 1
    assert removed in ([best, best + 1], [LAYERS - 2, LAYERS - 1])
    assert float(scores.layers[removed[0]]) <= found[best] + 1e-6


def test_only_tokens_that_are_looked_at_are_kept(model: PreTrainedModel, windows: Tensor) -> None:
    """A copy of the last tokens holds no more than these."""
    walk = LayerwiseForward(dense_decoder(model), windows, batch_size=2)
    copied = walk.copy(slice(-1, None))
    for part_BLD, whole_BLD in zip(copied, walk.streams, strict=True):
        assert torch.equal(part_BLD, whole_BLD[:, -1:])
        assert part_BLD.untyped_storage().nbytes() == part_BLD.numel() * part_BLD.element_size()


def _plan(folder: Path, family: str, criterion: dict[str, object], **sections: object) -> Plan:
    tiny_model(family, num_hidden_layers=LAYERS).config.save_pretrained(folder)
    return structure_of(
        Recipe.model_validate(
            {
                "model": {"id": str(folder)},
                "calibration": {"dataset": "text.txt", "samples": 32, "sequence_length": 16},
                "depth": {"remove": 2, "criterion": criterion},
            }
            | sections
        )
    )


def test_the_plan_counts_what_criteria_keep(tmp_path: Path) -> None:
    """For blocks of layers the states before each; for stand-ins a second walk, and its forward passes."""
    one, last, every, trials, residual = (
        _plan(tmp_path, "llama", criterion)
        for criterion in (
            {"kind": "block_influence"},
            {"kind": "angular"},
            {"kind": "angular", "tokens": "all"},
            {"kind": "divergence", "windows": 8},
            {"kind": "residual", "windows": 8, "refit_windows": 16},
        )
    )
    window = 16 * 32 * 4  # tokens, hidden size, bytes
    assert last.memory.streams - one.memory.streams == 2 * 32 * window // 16
    assert every.memory.streams - one.memory.streams == 2 * 32 * window
    assert residual.memory.streams - trials.memory.streams >= 2 * 16 * window
    unrepaired = _plan(tmp_path, "llama", {"kind": "residual"}, refit=False).memory.statistics
    assert unrepaired >= 4 * 96 * (2 * 96 + LAYERS * 32)  # sums, their factor, and a stand-in for each layer
    costs = [next(note for note in plan.notes if "depth.criterion" in note) for plan in (trials, residual)]
    passes = [(5 / 2 + 1 + 4 / 2 + 1) * 8 / 32, (1 + 4 / 5) * 16 / 32]
    assert f"cost about {passes[0]:.1f} forward" in costs[0]
    assert f"cost about {sum(passes):.1f} forward passes over the calibration tokens, and a refit" in costs[1]


@pytest.mark.parametrize("family", ["gemma2", "mamba"])
def test_residual_says_where_nothing_can_stand_in(family: str, windows: Tensor) -> None:
    """With a norm behind the MLP, or without one, it would be divergence under another name."""
    other = tiny_model(family, num_hidden_layers=3)
    with pytest.raises(CalibrationError, match=r"no layer of this model can stand in .* take divergence"):
        layer_ablation_scores(
            dense_decoder(other),
            discover(other.config),
            criterion=Residual(windows=2),
            windows_NL=windows,
            batch_size=2,
            remove=1,
        )


def test_stand_ins_are_the_same_in_files(model: PreTrainedModel, windows: Tensor, tmp_path: Path) -> None:
    """What they are solved on may lie in files as streams do."""
    scores = [
        layer_ablation_scores(
            dense_decoder(model),
            discover(model.config),
            criterion=Residual(windows=2),
            windows_NL=windows,
            batch_size=2,
            remove=2,
            store=store,
        )
        for store in (HiddenStateStore(), HiddenStateStore(0, tmp_path))
    ]
    assert torch.equal(*scores)


def test_scores_depend_on_the_number_only_where_they_say_so() -> None:
    """A change of depth.remove keeps the scores of criteria that score layers one by one."""
    assert BlockInfluence().horizon(6) == Perplexity(greedy=False).horizon(6) == 1
    assert Angular().horizon(6) == Divergence().horizon(6) == 6


def test_every_criterion_is_read_by_its_kind() -> None:
    """The kind that a recipe names picks the class."""
    adapter = TypeAdapter(DepthCriterion)
    for kind in (BlockInfluence, Angular, Perplexity, Divergence, Residual):
        assert type(adapter.validate_python({"kind": kind().kind})) is kind


def test_stand_ins_lower_the_divergence() -> None:
    """Where the layer before writes what predicts the layer's own output, the removal costs less with a stand-in."""
    model = tiny_model("llama", num_hidden_layers=LAYERS, hidden_size=16, intermediate_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)
    windows_NL = torch.randint(0, 16, (40, 12), generator=torch.Generator().manual_seed(5))
    kinds: list[TrialCriterion] = [
        Divergence(windows=8, greedy=False),
        Residual(windows=8, refit_windows=32, ridge=0.1, greedy=False),
    ]
    without, repaired = (
        layer_ablation_scores(
            dense_decoder(model), discover(model.config), criterion=kind, windows_NL=windows_NL, batch_size=8, remove=1
        )
        for kind in kinds
    )
    assert float(repaired[0]) == pytest.approx(float(without[0]), rel=1e-4)  # nothing is before the first layer
    assert float(repaired[1:].sum()) < float(without[1:].sum())


def test_all_processes_stand_in_alike(model: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a layer can be repaired is the first process's finding; one that measures otherwise goes by it."""
    dense, anatomy, criterion = dense_decoder(model), discover(model.config), Residual(windows=2)
    alone = layer_ablation_scores(dense, anatomy, criterion=criterion, windows_NL=windows, batch_size=2, remove=1)
    measured: list[float | None] = []
    measure = standins.residual_scale
    monkeypatch.setattr(standins, "residual_scale", lambda *args, **named: measured.append(measure(*args, **named)))
    monkeypatch.setattr(standins, "from_first", lambda _: measured[-1])
    assert torch.equal(
        layer_ablation_scores(dense, anatomy, criterion=criterion, windows_NL=windows, batch_size=2, remove=1), alone
    )


def test_residual_needs_windows_to_refit_on(model: PreTrainedModel, windows: Tensor) -> None:
    """Where all windows are judged on, the error says which setting to change."""
    with pytest.raises(CalibrationError, match=r"lower depth\.criterion\.windows"):
        layer_ablation_scores(
            dense_decoder(model),
            discover(model.config),
            criterion=Residual(windows=6),
            windows_NL=windows,
            batch_size=2,
            remove=1,
        )
