"""Layer patterns: found without a family's name, told where a cut breaks them, and kept where the recipe asks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import verify_here
from helpers.tiny import structure_of
from safetensors.torch import save_file
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.heads import count_heads
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.loading import dense_decoder
from llmprune.common.errors import RecipeError
from llmprune.criteria.base import AblationCriterion, DepthCriterion
from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.depth.repaired_divergence import Residual
from llmprune.cut.decision import Cut
from llmprune.cut.layer_choice import choose_in_pattern, kinds_of, possible_counts
from llmprune.pipeline.run import run
from llmprune.planning.interop import about_depth, about_head_size, about_layer_count
from llmprune.planning.plan import Plan
from llmprune.planning.sizes import planned_layers
from llmprune.recipe.depth import Depth
from llmprune.recipe.recipe import Recipe
from llmprune.score.ablation import layer_ablation_scores
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, DepthTarget, ScoringCriteria
from llmprune.score.scores import Scores
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_config, tiny_model

IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
# Families, fields that their tiny configs get, and the patterns that are found.
PATTERNS: list[tuple[str, dict[str, Any], list[tuple[str, int]]]] = [
    ("gemma3_text", {"num_hidden_layers": 8}, [("layer_types", 6)]),  # less than two periods: a field says 6
    ("gemma2", {"num_hidden_layers": 6}, [("layer_types", 2)]),
    ("smollm3", {"num_hidden_layers": 8}, [("no_rope_layers", 4)]),
    ("qwen3_next", {"num_hidden_layers": 8}, [("layer_types", 4)]),
    ("qwen2_moe", {"num_hidden_layers": 8, "decoder_sparse_step": 2}, [("mlp", 2)]),  # only its modules show it
    ("llama", {}, []),
    ("deepseek_v3", {}, []),  # its first layer is dense, which a count in the config says
]


def _plan(folder: Path, sections: str, family: str, **fields: Any) -> Plan:
    tiny_config(family, **fields).save_pretrained(folder)
    return structure_of(Recipe.parse(f"model: {{id: '{folder}'}}\ncalibration: {{dataset: text.txt}}\n{sections}\n"))


@pytest.fixture(scope="module")
def six() -> Anatomy:
    """Eight layers of which the sixth alone is of full attention."""
    return discover(tiny_config("gemma3_text", num_hidden_layers=8))


def _told(anatomy: Anatomy, **settings: Any) -> list[str]:
    """What a plan of these depth settings says of patterns."""
    depth = Depth.model_validate(settings)
    keep, named = planned_layers(depth, anatomy), depth.layers is not None
    return about_depth(anatomy, keep, named=named, keep_pattern=depth.keep_pattern)


def _best(anatomy: Anatomy, scores_N: torch.Tensor, keep: int) -> float:
    """The highest sum of scores of all choices that keep the pattern, each tried."""
    kinds = kinds_of(anatomy.patterns, anatomy.num_layers)
    fitting = [
        chosen
        for chosen in itertools.combinations(range(anatomy.num_layers), keep)
        if all(kinds[old] == kinds[new] for new, old in enumerate(chosen))
    ]
    return max(float(scores_N[list(chosen)].sum()) for chosen in fitting)


@pytest.mark.parametrize(("family", "fields", "expected"), PATTERNS)
def test_patterns_are_found_in_lists_and_modules(
    family: str, fields: dict[str, Any], expected: list[tuple[str, int]]
) -> None:
    """By what repeats, whatever the family; what is listed in no order or comes first is no pattern."""
    found = discover(tiny_config(family, **fields)).patterns
    assert [(pattern.name, pattern.period) for pattern in found] == expected


def test_a_cut_that_breaks_the_pattern_is_told(six: Anatomy) -> None:
    """In one sentence: the list, the period, the first layer that differs, and what assumes it."""
    (note,) = _told(six, layers=(1,))
    assert "repeats every 6 layers in the base and not in what is kept: layer 4 is full_attention" in note
    assert "llama.cpp" in note
    assert "keep_pattern" in note


@pytest.mark.parametrize("settings", [{"layers": (7,)}, {"layers": (6,)}, {"layers": (6,), "keep_pattern": True}])
def test_a_cut_that_keeps_the_pattern_is_not_warned_of(settings: dict[str, Any], six: Anatomy) -> None:
    """Without one of the last two sliding layers the others stand where the period says."""
    assert _told(six, **settings) == []


def test_scores_that_may_break_the_pattern_are_told_before_they_are_known(six: Anatomy) -> None:
    """With ``keep_pattern`` they cannot."""
    (note,) = _told(six, remove=2)
    assert "the scores may choose layers that break this" in note
    assert _told(six, remove=2, keep_pattern=True) == []


def test_named_layers_that_break_the_pattern_are_refused_where_it_is_to_be_kept(six: Anatomy) -> None:
    """The sentence names the first layer that would stand wrong."""
    with pytest.raises(RecipeError, match="layer 5 would become layer 4, which is full_attention"):
        _told(six, layers=(1,), keep_pattern=True)


def test_counts_that_leave_no_full_attention_are_refused_with_those_that_do(six: Anatomy) -> None:
    """The first full-attention layer of a pattern of six is the sixth."""
    with pytest.raises(RecipeError, match="keep 6–8 layers"):
        _told(six, keep=5, keep_pattern=True)
    assert planned_layers(Depth(keep=6, keep_pattern=True), six) == (0, 1, 2, 3, 4, 5)


def test_a_model_without_patterns_says_that_there_is_none_to_keep() -> None:
    """A wish that changes nothing is told."""
    (note,) = _told(discover(tiny_config("llama")), remove=2, keep_pattern=True)
    assert "no kind of layer repeats" in note


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3_next"])
def test_the_best_layers_in_the_pattern_stay(family: str) -> None:
    """Of all choices that follow the pattern the one with the highest scores, for every number that is possible."""
    anatomy = discover(tiny_config(family, num_hidden_layers=8))
    kinds = kinds_of(anatomy.patterns, 8)
    for seed, keep in itertools.product(range(4), possible_counts(anatomy)):
        scores_N = torch.rand(8, generator=torch.Generator().manual_seed(seed))
        chosen = choose_in_pattern(scores_N, keep, anatomy=anatomy)
        assert [kinds[old] for old in chosen] == list(kinds[:keep])
        assert float(scores_N[list(chosen)].sum()) == pytest.approx(_best(anatomy, scores_N, keep))


@pytest.mark.parametrize(
    "criterion",
    [
        BlockInfluence(),
        Angular(),
        Perplexity(windows=2),
        Divergence(windows=2, greedy=False),
        Divergence(windows=2),
        Residual(windows=2, refit_windows=2),
    ],
    ids=["passing", "contiguous", "greedy", "at-once", "greedy-divergence", "greedy-refit"],
)
def test_every_depth_criterion_keeps_the_pattern(criterion: DepthCriterion) -> None:
    """Scores that break it alone choose among what keeps it; a block stays one block, rounds leave out what can go."""
    model, remove = tiny_model("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2), 3
    with torch.no_grad():
        for index, part in {1: 1e-3, 2: 1e-3, 4: 0.2}.items():  # these matter least
            for name, parameter in model.model.layers[index].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.mul_(part)
    anatomy, dense = discover(model.config), dense_decoder(model)
    kinds = kinds_of(anatomy.patterns, 6)
    assert [pattern.period for pattern in anatomy.patterns] == [2]

    def chosen(keep_pattern: bool) -> tuple[Cut, Tensor]:
        if isinstance(criterion, AblationCriterion):
            layers_N = layer_ablation_scores(
                dense,
                anatomy,
                criterion=criterion,
                calibration=CalibrationBatches(IDS, 4),
                target=DepthTarget(remove, keep_pattern=keep_pattern),
            )
        else:
            scores = score(
                dense,
                anatomy,
                criteria=ScoringCriteria(depth=criterion),
                calibration=CalibrationBatches(IDS, 4),
                target=DepthTarget(remove, keep_pattern=keep_pattern),
            )
            assert scores.layers is not None
            layers_N = scores.layers
        wanted = (None, 6 - remove, {}, None)
        return choose_cut(
            anatomy, Scores(layers_N, {}), sizes=PlannedSizes(*wanted, keep_pattern=keep_pattern)
        ), layers_N

    assert [kinds[old] for old in chosen(False)[0].layers] != list(kinds[: 6 - remove])
    cut, layers_N = chosen(True)
    assert [kinds[old] for old in cut.layers] == list(kinds[: 6 - remove])
    if isinstance(criterion, Angular):
        assert cut.removed[-1] - cut.removed[0] == remove - 1
    if isinstance(criterion, AblationCriterion) and criterion.greedy:
        assert sorted(torch.argsort(layers_N, stable=True)[:remove].tolist()) == list(cut.removed)


def test_the_report_says_what_the_scores_did_to_the_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan said of a risk becomes what happened."""
    verify_here(monkeypatch)
    tiny_model("gemma3_text", num_hidden_layers=8).save_pretrained(tmp_path / "base")
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    tokens = f"{{tokens: '{tmp_path}/ids.safetensors', key: input_ids, samples: 4, sequence_length: 24}}"
    monkeypatch.setattr("llmprune.score.select.choose_layers", lambda *_, **__: (0, 2, 3, 4, 5, 6, 7))
    report = run(
        Recipe.parse(
            f"model: {{id: '{tmp_path}/base'}}\ncalibration: {tokens}\nevaluation: {{perplexity: null}}\nrefit: false\n"
            "depth: {remove: 1}\n"
        ),
        tmp_path / "run",
    )
    (about,) = [warning for warning in report.warnings if "layer_types" in warning]
    assert "not in what is kept: layer 4 is full_attention" in about


def test_an_attention_scale_that_is_not_the_heads_size_is_told_where_layers_go() -> None:
    """llama.cpp knows such a model by its number of layers."""
    said = []
    for scalar, layers in ((8, 3), (16, 3), (16, 4)):
        config = tiny_config("gemma2", query_pre_attn_scalar=scalar)
        fewer = tiny_config("gemma2", query_pre_attn_scalar=scalar, num_hidden_layers=layers)
        said += about_layer_count(build_meta_model(config), build_meta_model(fewer))
    assert len(said) == 1
    assert "the attention scale is set by query_pre_attn_scalar (16) and not by head_dim (8)" in said[0]


def test_a_value_that_follows_the_number_of_layers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a model's code derives it."""
    from transformers import LlamaModel

    original = LlamaModel.__init__

    def scaled(self: Any, config: Any) -> None:
        original(self, config)
        self.depth_scale = config.num_hidden_layers**-0.5

    monkeypatch.setattr(LlamaModel, "__init__", scaled)
    notes = _plan(tmp_path, "depth: {remove: 3}", "llama").notes
    assert any("derived from the number of layers" in note and "depth_scale (0.5 → 1)" in note for note in notes)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("phi3", "the config of this model type has no head_dim, so the result's says head_dim: 8"),
        ("llama", "the base's config.json leaves head_dim to hidden_size / num_attention_heads"),
    ],
)
def test_a_size_of_heads_that_tools_derive_is_told_where_heads_go(family: str, said: str) -> None:
    """With the tools; where the base's own file says the size, or no heads go, there is nothing to tell."""
    config = tiny_config(family, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    heads = count_heads(config)
    for raw, kept, told in (({}, 2, True), ({}, 4, False), ({"head_dim": 8}, 2, family == "phi3")):
        fixed = {"head_dim": 8} if family == "phi3" else {}
        found = replace(heads, fixed=fixed) if heads else None
        notes = about_head_size(config, raw, heads=found, kept=kept)
        assert [note.startswith(said) and "llama.cpp" in note for note in notes] == [True] * told


def test_a_plan_tells_the_size_of_heads_that_tools_derive(tmp_path: Path) -> None:
    """Found in the config's class, for a model whose file says nothing."""
    fields = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    notes = _plan(tmp_path, "width: {heads: 2}", "phi3", **fields).notes
    assert any("the config of this model type has no head_dim" in note for note in notes)
