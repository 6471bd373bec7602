"""Attention heads by key-value group: discovery, refusals, planned numbers, scores, and the refit of their output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from helpers.tiny import structure_of
from safetensors.torch import save_file

from llmprune import Recipe, run
from llmprune.anatomy.discovery import discover
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.selection import rows_of
from llmprune.anatomy.types import PrunableDim, unit_key
from llmprune.common.errors import ModelError, RecipeError
from llmprune.criteria.width.activation import Activation
from llmprune.cut.apply import cut_config
from llmprune.planning.plan_schema import Plan
from llmprune.score.forward_pass import score
from llmprune.score.inputs import CalibrationBatches, ScoringCriteria
from llmprune.score.select import PlannedSizes, choose_cut
from llmprune.testing import VOCABULARY, tiny_config, tiny_model

IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
FOUR_GROUPS = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}


def _plan(folder: Path, width: str, family: str = "llama", **overrides: Any) -> Plan:
    tiny_config(family, **overrides).save_pretrained(folder)
    text = f"model: {{id: '{folder}', dtype: float32}}\ncalibration: {{dataset: text.txt}}\nwidth: {width}\n"
    return structure_of(Recipe.parse(text))


@pytest.mark.parametrize(
    ("named", "kinds"), [("", ("share_taylor", "activation")), (", criterion: {kind: flap}", ("flap",) * 2)]
)
def test_neurons_and_heads_have_separate_default_criteria(named: str, kinds: tuple[str, str]) -> None:
    """A criterion in the recipe scores both."""
    width = Recipe.parse(
        f"model: {{id: x}}\ncalibration: {{dataset: t.txt}}\nwidth: {{mlp: 0.5, heads: 1{named}}}\n"
    ).width
    assert width is not None
    assert (width.neuron_criterion.kind, width.head_criterion.kind) == kinds


@pytest.mark.parametrize(
    ("parts", "rows"),
    [
        ((1,), [2, 0]),
        ((2,), [4, 5, 0, 1]),
        ((1, 1), [2, 0, 5, 3]),
        ((2, 1, 1), [4, 5, 0, 1, 8, 6, 11, 9]),
    ],
)
def test_a_group_has_entries_in_every_part(parts: tuple[int, ...], rows: list[int]) -> None:
    """The rows of the last and the first of three groups are adjacent in each of the consecutive parts."""
    keep_K = torch.tensor([2, 0])
    assert rows_of(keep_K, 3 * sum(parts), prunable=PrunableDim("weight", 0, parts)).tolist() == rows


@pytest.mark.parametrize(
    ("family", "overrides", "parts"),
    [
        ("llama", {}, {"q_proj": (16,), "k_proj": (8,), "v_proj": (8,), "o_proj": (16,)}),
        ("phi3", {}, {"qkv_proj": (16, 8, 8), "o_proj": (16,)}),  # fused: queries, keys, values
        ("qwen3_next", {}, {"q_proj": (32,), "k_proj": (8,), "v_proj": (8,), "o_proj": (16,)}),  # queries and gates
        ("deepseek_v3", {}, {"q_b_proj": (16,), "kv_b_proj": (16,), "o_proj": (8,)}),
    ],
)
def test_tensors_of_a_group_are_found(family: str, overrides: dict[str, Any], parts: dict[str, Any]) -> None:
    """Query, key, value and output projections of a group are found, separate or fused."""
    anatomy = discover(tiny_config(family, **overrides))
    unit = next(unit for unit in anatomy.attention if unit)
    assert {cut.name.split(".")[1]: cut.parts for cut in unit.tensors} == parts
    assert unit.output == "self_attn.o_proj"
    assert unit.refit


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("gpt2", {}, "hidden_size divided by their number"),
        ("olmo2", {}, "not the same when groups of heads are cut as when they are masked"),
        ("llama", {"num_key_value_heads": 1}, "share one key and value"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ("mamba", {}, "counts no attention heads"),
    ],
)
def test_removal_of_heads_is_refused_with_a_reason(
    family: str, overrides: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """The plan and the config of a cut refuse it, with the reason."""
    with pytest.raises(RecipeError) as caught:
        _plan(tmp_path, "{heads: 1}", family, **overrides)
    assert "width.heads: no attention heads of this model can be removed" in str(caught.value)
    assert reason in str(caught.value)
    config = tiny_config(family, **overrides)
    with pytest.raises(ModelError, match="attention heads of this model cannot be removed"):
        cut_config(config, discover(config), kept=KeptSizes((0, 1, 2, 3), kv_groups=99))


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ("{heads: 5}", "5 is more than the 4 key-value groups that the attention has; keep 1, 2, 4"),
        ("{heads: 3}", "3 of 4 key-value groups cannot be kept, the config refuses num_attention_heads 6"),
        ("{heads: 0}", "width.heads: must be above 0"),
        ("{heads: 1.5}", "width.heads: must be at most 1"),
        ("{heads: two}", "width.heads: must be a whole number or a number, not"),
        ("{}", "width: needs at least one of mlp, neurons, heads; none given"),
        ("{heads: 1, mlp: 0.5, neurons: 32}", "width: needs exactly one of mlp, neurons"),
    ],
)
def test_impossible_numbers_of_heads_are_refused(width: str, message: str, tmp_path: Path) -> None:
    """The message has the limit and the remedy, for values that the model's config refuses too."""
    with pytest.raises(RecipeError) as caught:
        _plan(tmp_path, width, **FOUR_GROUPS)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "kept", "noted"), [("0.5", 2, False), ("0.7", 2, True), ("1.0", 4, False), ("1", 1, False)]
)
def test_a_fraction_takes_what_the_config_accepts(heads: str, kept: int, noted: bool, tmp_path: Path) -> None:
    """A fraction is rounded to a number of groups that the config accepts, with a note; cache and weights shrink."""
    plan = _plan(tmp_path, f"{{heads: {heads}}}", **FOUR_GROUPS)
    assert plan.keep_kv_groups == plan.pruned.kv_groups == kept
    assert (
        any("2.8 of 4 key-value groups is rounded to 2: the config accepts 1, 2, 4" in n for n in plan.notes) == noted
    )
    assert plan.dense.kv_bytes_per_token == 4 * 2 * 4 * 8 * 4  # layers, keys and values, groups, dimensions, bytes
    assert plan.pruned.kv_bytes_per_token == plan.dense.kv_bytes_per_token * kept // 4
    lost = (
        4 * (4 - kept) * (2 + 1 + 1 + 2) * 8 * 64
    )  # in each layer, of queries, keys, values and the output projection
    assert plan.dense.parameters - plan.pruned.parameters == lost
    assert plan.keep_widths == {}


def test_the_score_of_a_group_is_the_sum_over_its_inputs_of_the_output_projection() -> None:
    """The criterion scores the inputs like neurons. A recipe for heads alone scores and cuts no neurons."""
    model = tiny_model("llama", **FOUR_GROUPS)
    anatomy, dense = discover(model.config), dense_decoder(model)
    seen: list[torch.Tensor] = []
    projection = model.model.layers[2].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    scores_F = seen[0].square().mean(0) * projection.weight.square().sum(0)
    scores = score(dense, anatomy, criteria=ScoringCriteria(heads=Activation()), calibration=CalibrationBatches(IDS, 4))
    assert scores.layers is None
    assert scores.neurons == {}
    torch.testing.assert_close(scores.heads[unit_key(2, "self_attn")], scores_F.view(4, 16).sum(1))
    cut = choose_cut(anatomy, scores, sizes=PlannedSizes((), 4, kv_groups=2))
    assert cut.neurons == {}
    best_K = scores_F.view(4, 16).sum(1).topk(2).indices.sort().values
    assert torch.equal(cut.heads[unit_key(2, "self_attn")], best_K)


@pytest.mark.usefixtures("in_one_process")
def test_the_refit_restores_the_output_of_removed_heads(tmp_path: Path) -> None:
    """With duplicate groups the refit removes the error of the cut; without it the error is large."""
    model = tiny_model("llama", **FOUR_GROUPS)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.copy_(projection.weight[: len(projection.weight) // 4].repeat(4, 1))
            attention.o_proj.weight.mul_(20)
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": torch.randint(0, 64, (8, 32))}, tmp_path / "ids.safetensors")
    recipe = {
        "model": {"id": str(tmp_path / "model")},
        "calibration": {"tokens": str(tmp_path / "ids.safetensors"), "key": "ids", "self_generated": 0},
        "width": {"heads": 1},
    }
    repaired = run(Recipe.model_validate(recipe | {"refit": {"ridge": 1e-6}}), tmp_path / "repaired")
    chosen = run(Recipe.model_validate(recipe), tmp_path / "chosen")
    plain = run(Recipe.model_validate(recipe | {"refit": False}), tmp_path / "plain")
    errors = [max(layer.error_refit or layer.error_cut or 0.0 for layer in r.layers) for r in (repaired, chosen, plain)]
    assert errors[0] < 1e-3
    assert errors[0] < errors[1] < 0.2 * errors[2]
    assert all(layer.mixer_held_out is not None and layer.mixer_held_out < -0.5 for layer in chosen.layers)
