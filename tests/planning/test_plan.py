"""Plans from a config alone: parameter counts, sizes, refusals, and every recipe that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.public_configs import LLAMA_31_8B, SMOLLM2_135M
from helpers.tiny import structure_of
from transformers import AutoModelForCausalLM

from llmprune.common.errors import ModelError, RecipeError
from llmprune.planning.plan_schema import Plan
from llmprune.recipe.recipe import Recipe
from llmprune.testing import tiny_config

RECIPES = Path(__file__).parents[2] / "recipes"

# Sizes in the models' public configs.
LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
LLAMA_31_405B = LLAMA_31_8B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
# By recipe: the model's config, and the layers and the MLP width that the recipe keeps.
READY = {
    "quickstart.yaml": (SMOLLM2_135M, 28, 1152),
    "smollm2-135m.yaml": (SMOLLM2_135M, 27, 1152),
    "llama-3.1-8b.yaml": (LLAMA_31_8B, 28, 10752),
    "recover-llama-3.1-8b.yaml": (LLAMA_31_8B, 28, 10752),
    "qwen3-8b.yaml": (QWEN3_8B, 32, 9216),
    "llama-2-70b-mlperf.yaml": (LLAMA_2_70B, 32, 14336),
}


def _by_hand(config: dict[str, Any], layers: int, width: int) -> int:
    """Count the parameters of a llama or qwen3 by formula: embeddings, and per layer attention, MLP and norms."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    norms = 2 * hidden + (2 * head if config["model_type"] == "qwen3" else 0)
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return embeddings + layers * (attention + 3 * hidden * width + norms) + hidden


def _folder(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def _plan(path: Path, config: dict[str, Any], *overrides: str) -> Plan:
    text = f"model: {{id: '{_folder(path, config)}'}}\ncalibration: {{dataset: text.txt}}\n"
    return structure_of(Recipe.parse(text, overrides))


def test_every_ready_recipe_is_planned() -> None:
    """The table above has every recipe of the folder that names its sizes."""
    assert {path.name for path in RECIPES.glob("*.yaml") if Recipe.load(path).budget is None} == READY.keys()


@pytest.mark.parametrize("name", READY)
def test_ready_recipes_plan(name: str, tmp_path: Path) -> None:
    """A config.json is enough for a plan with exact parameter counts before and after the cut."""
    config, layers, width = READY[name]
    overrides = [f"model.id={_folder(tmp_path, config)}", "model.dtype=auto"]
    plan = structure_of(Recipe.load(RECIPES / name, overrides))
    assert plan.dense.parameters == _by_hand(config, config["num_hidden_layers"], config["intermediate_size"])
    assert plan.pruned.parameters == _by_hand(config, layers, width)
    assert plan.parameters_exact


def test_mlperf_shape_has_16_6_billion_parameters() -> None:
    """NVIDIA's pruned MLPerf submission has 32 of 80 layers and 14,336 of 28,672 neurons."""
    assert _by_hand(LLAMA_2_70B, 32, 14336) == pytest.approx(16.6e9, rel=0.01)


def test_405b_plans_from_its_config(tmp_path: Path) -> None:
    """The largest open dense model is planned in seconds, without memory for its weights."""
    plan = _plan(tmp_path, LLAMA_31_405B, "depth.remove=26", "width.mlp=0.8")
    assert plan.dense.parameters == 405_853_388_800
    assert plan.keep_widths == {"intermediate_size": 42496}
    assert any("rounded to 42496, a multiple of 256" in note for note in plan.notes)


TWO_LAYERS = SMOLLM2_135M | {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "width.mlp=0.999",
            "width.mlp: 0.999 of 1,536 neurons keeps all 1,536 (intermediate_size), because widths are rounded to "
            "multiples of 128: ask for width.mlp 0.958 or less, or for width.neurons 1408 or less",
        ),
        ("width.neurons=1500", "width.neurons: 1,500 of 1,536 keeps all 1,536"),
        (
            "width.heads=0.9",
            "0.9 of 3 key-value groups keeps all 3: ask for 0.833 or less, or for a number of them: 1, 2",
        ),
        ("sparsity.pattern=0.0001", "sparsity: 0.0001 of the inputs of each output is less than half a weight"),
    ],
)
def test_a_setting_without_effect_is_refused(setting: str, message: str, tmp_path: Path) -> None:
    """The message has the numbers and the nearest value that cuts; together with another cut it is a note."""
    with pytest.raises(RecipeError) as caught:
        _plan(tmp_path, TWO_LAYERS, setting, "refit=false")
    assert message in str(caught.value)
    plan = _plan(tmp_path, TWO_LAYERS, setting, "depth.remove=1", "refit=false")
    assert any(message in note for note in plan.notes)
    assert not any("is rounded to" in note for note in plan.notes)


def test_the_proposed_value_cuts_one_step(tmp_path: Path) -> None:
    """The value that the refusal proposes removes one step of the width."""
    assert _plan(tmp_path, TWO_LAYERS, "width.mlp=0.958").keep_widths == {"intermediate_size": 1408}
    assert _plan(tmp_path, TWO_LAYERS, "width.neurons=1408").keep_widths == {"intermediate_size": 1408}


def test_a_width_of_one_multiple_cannot_be_narrowed(tmp_path: Path) -> None:
    """A width of 128 is rounded to 128 for every fraction, and the refusal says so."""
    with pytest.raises(RecipeError, match=r"0\.5 of 128 neurons keeps all 128 .* this width cannot be narrowed"):
        _plan(tmp_path, TWO_LAYERS | {"intermediate_size": 128}, "width.mlp=0.5")


@pytest.mark.parametrize(
    "setting", ["width.mlp=1.0", "width.neurons=1536", "width.heads=3", "width.heads=1.0", "depth.keep=2"]
)
def test_keeping_all_on_purpose_is_allowed(setting: str, tmp_path: Path) -> None:
    """A recipe that asks to keep everything gets a plan that cuts nothing and says so, without a note on rounding."""
    plan = _plan(tmp_path, TWO_LAYERS, setting)
    assert plan.dense == plan.pruned
    assert not any("keeps all" in note for note in plan.notes)
    assert any(note.startswith("nothing is cut") for note in plan.notes)


def test_settings_that_nothing_uses_are_noted(tmp_path: Path) -> None:
    """Those of tasks where none is evaluated, and the revision of a folder."""
    unused = ("evaluation.limit=5", "evaluation.metrics={arc_easy: acc}", "model.revision=v1")
    notes = _plan(tmp_path, TWO_LAYERS, "depth.remove=1", *unused).notes
    assert any(note.startswith("evaluation.metrics, evaluation.limit: not used") for note in notes)
    assert any(note.startswith("model.revision has no effect") for note in notes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mixtral", "qwen3_next"])
def test_counts_are_those_of_the_real_model(family: str, tmp_path: Path) -> None:
    """Parameters and bytes are those of the model that transformers builds, tied tensors counted once."""
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    text = f"model: {{id: '{tmp_path}', dtype: float32}}\ncalibration: {{dataset: text.txt}}\n"
    plan = structure_of(Recipe.parse(text))
    model = AutoModelForCausalLM.from_config(config)
    assert plan.dense.parameters == plan.pruned.parameters == model.num_parameters()
    assert plan.dense.bytes == 4 * model.num_parameters()


def test_cache_bytes_follow_from_keys_and_values(tmp_path: Path) -> None:
    """The cache of a token has layers × 2 × key-value heads × head size × bytes of the dtype."""
    plan = _plan(tmp_path, LLAMA_31_8B, "depth.keep=24")
    assert plan.dense.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert plan.pruned.kv_bytes_per_token == 24 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("depth.remove=30", "remove at most 29"),
        ("depth.remove=31", "remove at most 29"),
        ("depth.keep=31", "keep at most 30"),
        ("depth.layers=[3, 30]", "the model has layers 0 to 29, not \\[30\\]"),
        ("width.neurons=1664", "1664 is more than the 1536 neurons"),
    ],
)
def test_impossible_sizes_are_refused(override: str, message: str, tmp_path: Path) -> None:
    """The message has the limit and the remedy."""
    with pytest.raises(RecipeError, match=message):
        _plan(tmp_path, SMOLLM2_135M, override)


def test_a_depth_that_cannot_be_cut_is_reported_with_other_problems(tmp_path: Path) -> None:
    """One error lists the refused depth and an impossible width."""
    tiny_config("qwen3_vl").save_pretrained(tmp_path)
    recipe = Recipe.parse(
        f"model: {{id: '{tmp_path}'}}\ncalibration: {{dataset: t.txt}}\ndepth: {{remove: 1}}\nwidth: {{neurons: 999}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        structure_of(recipe)
    assert [message.split(":")[0] for message in caught.value.problems] == ["depth", "width.neurons"]
    assert "features of images are added" in caught.value.problems[0]


@pytest.mark.parametrize(("family", "reason"), [("bert", "both directions"), ("t5", "decoder-only")])
def test_other_models_are_refused(family: str, reason: str, tmp_path: Path) -> None:
    """An encoder and an encoder-decoder are refused, because they are not causal decoders."""
    with pytest.raises(ModelError, match=reason):
        _plan(tmp_path, {"model_type": family, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4})
