"""Layer patterns: found in any family, reported where a cut breaks them, and preserved on request."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import verify_here
from helpers.decoders import dense_decoder
from helpers.tiny import structure_of
from safetensors.torch import save_file
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.heads import count_heads
from llmprune.anatomy.layer_kinds import kinds_of
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.anatomy.types import Anatomy
from llmprune.common.errors import RecipeError
from llmprune.criteria.ablation import AblationCriterion
from llmprune.criteria.base import DepthCriterion
from llmprune.criteria.depth.angular import Angular
from llmprune.criteria.depth.block_influence import BlockInfluence
from llmprune.criteria.depth.divergence import Divergence
from llmprune.criteria.depth.perplexity import Perplexity
from llmprune.criteria.depth.residual import Residual
from llmprune.cut.decision import Cut
from llmprune.cut.layer_choice import choose_in_pattern, possible_counts
from llmprune.pipeline.run import run
from llmprune.planning.next_tools.tool_compatibility import (
    about_depth,
    about_derived_widths,
    about_head_size,
    about_layer_count,
)
from llmprune.planning.plan_schema import Plan
from llmprune.planning.sizes.planned_layers import planned_layers
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
    """Return the anatomy of eight layers of which only the sixth has full attention."""
    return discover(tiny_config("gemma3_text", num_hidden_layers=8))


def _notes(anatomy: Anatomy, **settings: Any) -> list[str]:
    """Return the notes on patterns in a plan with these depth settings."""
    depth = Depth.model_validate(settings)
    keep, named = planned_layers(depth, anatomy), depth.layers is not None
    return about_depth(anatomy, keep, named=named, keep_pattern=depth.keep_pattern)


def _best(anatomy: Anatomy, scores_N: torch.Tensor, keep: int) -> float:
    """Return the highest sum of scores of all choices that preserve the pattern, by exhaustive search."""
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
    """Lists and modules that repeat are patterns; first layers of another kind are none."""
    found = discover(tiny_config(family, **fields)).patterns
    assert [(pattern.name, pattern.period) for pattern in found] == expected


def test_a_cut_that_breaks_the_pattern_is_reported(six: Anatomy) -> None:
    """The note has the list, the period, the first layer that differs, and a tool that assumes the period."""
    (note,) = _notes(six, layers=(1,))
    assert "repeats every 6 layers in the base and not in the pruned model: layer 4 is full_attention" in note
    assert "llama.cpp" in note
    assert "keep_pattern" in note


@pytest.mark.parametrize("settings", [{"layers": (7,)}, {"layers": (6,)}, {"layers": (6,), "keep_pattern": True}])
def test_a_cut_that_preserves_the_pattern_has_no_note(settings: dict[str, Any], six: Anatomy) -> None:
    """Without one of the last two sliding layers the others still follow the period."""
    assert _notes(six, **settings) == []


def test_a_plan_warns_that_scores_may_break_the_pattern(six: Anatomy) -> None:
    """With ``keep_pattern`` there is no warning."""
    (note,) = _notes(six, remove=2)
    assert "the scores may choose layers that break this" in note
    assert _notes(six, remove=2, keep_pattern=True) == []


def test_named_layers_that_break_the_pattern_are_refused_with_keep_pattern(six: Anatomy) -> None:
    """The message names the first layer that breaks it."""
    with pytest.raises(RecipeError, match="layer 5 would become layer 4, which is full_attention"):
        _notes(six, layers=(1,), keep_pattern=True)


def test_numbers_of_layers_without_full_attention_are_refused(six: Anatomy) -> None:
    """The message has the possible numbers: the first full-attention layer is the sixth."""
    with pytest.raises(RecipeError, match="keep 6–8 layers"):
        _notes(six, keep=5, keep_pattern=True)
    assert planned_layers(Depth(keep=6, keep_pattern=True), six) == (0, 1, 2, 3, 4, 5)


def test_keep_pattern_without_a_pattern_has_a_note() -> None:
    """A setting without effect is reported."""
    (note,) = _notes(discover(tiny_config("llama")), remove=2, keep_pattern=True)
    assert "no kind of layer repeats" in note


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen3_next"])
def test_the_best_layers_in_the_pattern_stay(family: str) -> None:
    """For every possible number of layers, the choice has the highest scores of all that follow the pattern."""
    anatomy = discover(tiny_config(family, num_hidden_layers=8))
    kinds = kinds_of(anatomy.patterns, 8)
    for seed, keep in itertools.product(range(4), possible_counts(anatomy, keep_pattern=True)):
        scores_N = torch.rand(8, generator=torch.Generator().manual_seed(seed))
        chosen = choose_in_pattern(scores_N, keep, anatomy=anatomy, keep_pattern=True)
        assert [kinds[old] for old in chosen] == list(kinds[:keep])
        assert float(scores_N[list(chosen)].sum()) == pytest.approx(_best(anatomy, scores_N, keep))


@pytest.mark.parametrize(
    "criterion",
    [
        BlockInfluence(),
        Angular(),
        Perplexity(windows=2),
        Divergence(windows=2, greedy=False),
        Divergence(windows=2, greedy=True, candidates=None),
        Residual(windows=2, refit_windows=2),
    ],
    ids=["passing", "contiguous", "greedy", "at-once", "greedy-divergence", "greedy-refit"],
)
def test_every_depth_criterion_can_preserve_the_pattern(criterion: DepthCriterion) -> None:
    """With ``keep_pattern``, scores that break the pattern choose layers that preserve it; blocks stay contiguous."""
    model, remove = tiny_model("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2), 3
    with torch.no_grad():
        for index, part in {1: 1e-3, 2: 1e-3, 4: 0.2}.items():  # these layers have the lowest scores
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
        sizes = PlannedSizes(None, 6 - remove, keep_pattern=keep_pattern)
        return choose_cut(anatomy, Scores(layers_N, {}), sizes=sizes), layers_N

    assert [kinds[old] for old in chosen(False)[0].layers] != list(kinds[: 6 - remove])
    cut, layers_N = chosen(True)
    assert [kinds[old] for old in cut.layers] == list(kinds[: 6 - remove])
    if isinstance(criterion, Angular):
        assert cut.removed[-1] - cut.removed[0] == remove - 1
    if isinstance(criterion, AblationCriterion) and criterion.greedy:
        assert sorted(torch.argsort(layers_N, stable=True)[:remove].tolist()) == list(cut.removed)


def test_the_report_states_how_the_scores_broke_the_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the report, the plan's warning of a risk is replaced by the broken pattern."""
    verify_here(monkeypatch)
    model = tiny_model("gemma3_text", num_hidden_layers=8)
    for name, parameter in model.model.layers[1].named_parameters():
        if name.startswith("post_"):
            parameter.data.fill_(-0.999)  # Gemma's norms scale by 1 + weight: this layer adds least, so it is removed
    model.save_pretrained(tmp_path / "base")
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    tokens = (
        f"{{tokens: '{tmp_path}/ids.safetensors', key: input_ids, samples: 4, sequence_length: 24, self_generated: 0}}"
    )
    report = run(
        Recipe.parse(
            f"model: {{id: '{tmp_path}/base'}}\ncalibration: {tokens}\nevaluation: {{perplexity: null}}\nrefit: false\n"
            "depth: {remove: 1}\n"
        ),
        tmp_path / "run",
    )
    (warning,) = [warning for warning in report.warnings if "layer_types" in warning]
    assert "not in the pruned model: layer 4 is full_attention" in warning


def test_an_attention_scale_other_than_the_head_size_has_a_note_where_layers_are_removed() -> None:
    """llama.cpp recognises such a model by its number of layers."""
    notes = []
    for scalar, layers in ((8, 3), (16, 3), (16, 4)):
        config = tiny_config("gemma2", query_pre_attn_scalar=scalar)
        fewer = tiny_config("gemma2", query_pre_attn_scalar=scalar, num_hidden_layers=layers)
        notes += about_layer_count(build_meta_model(config), build_meta_model(fewer))
    assert len(notes) == 1
    assert "the attention scale is set by query_pre_attn_scalar (16) and not by head_dim (8)" in notes[0]


def test_a_value_that_depends_on_the_number_of_layers_has_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that the model's code derives is found on the built models."""
    from transformers import LlamaModel

    original = LlamaModel.__init__

    def scaled(self: Any, config: Any) -> None:
        original(self, config)
        self.depth_scale = config.num_hidden_layers**-0.5

    monkeypatch.setattr(LlamaModel, "__init__", scaled)
    notes = _plan(tmp_path, "depth: {remove: 3}", "llama").notes
    assert any("derived from the number of layers" in note and "depth_scale (0.5 → 1)" in note for note in notes)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("phi3", "the config of this model type has no head_dim, so the result's states head_dim: 8"),
        ("llama", "the base's config.json leaves head_dim to hidden_size / num_attention_heads"),
    ],
)
def test_a_head_size_that_tools_derive_has_a_note_where_heads_are_removed(family: str, message: str) -> None:
    """There is no note where the base's own file states the size, or where no heads are removed."""
    config = tiny_config(family, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    heads = count_heads(config)
    for raw, kept, noted in (({}, 2, True), ({}, 4, False), ({"head_dim": 8}, 2, family == "phi3")):
        fixed = {"head_dim": 8} if family == "phi3" else {}
        found = replace(heads, fixed=fixed) if heads else None
        notes = about_head_size(config, raw, heads=found, kept=kept)
        assert [note.startswith(message) and "llama.cpp" in note for note in notes] == [True] * noted


def test_a_plan_has_the_note_on_the_head_size(tmp_path: Path) -> None:
    """The plan of a model whose config class has no field for the size includes the note."""
    fields = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    notes = _plan(tmp_path, "width: {heads: 2}", "phi3", **fields).notes
    assert any("the config of this model type has no head_dim" in note for note in notes)


def test_a_width_that_llama_cpp_derives_is_noted() -> None:
    """GPT-2's narrower MLP cannot be loaded there; whole ones, and widths that it reads, need no note."""
    gpt2 = discover(tiny_config("gpt2"))
    width = gpt2.widths["n_inner"]
    (note,) = about_derived_widths(gpt2, {"n_inner": width // 2})
    assert "takes 4 × n_embd for the MLP width of this model type and does not read n_inner" in note
    assert not about_derived_widths(gpt2, {"n_inner": width})
    assert not about_derived_widths(discover(tiny_config("llama")), {"intermediate_size": 8})


def test_the_only_layer_stays(six: Anatomy) -> None:
    """A remedy that removes nothing is none: the section is to go."""
    with pytest.raises(RecipeError, match="at least one must stay: remove the section"):
        planned_layers(Depth(remove=1), replace(six, num_layers=1))
    with pytest.raises(RecipeError, match="remove at most 7"):
        planned_layers(Depth(remove=8), six)
