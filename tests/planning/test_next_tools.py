"""Tools that a planned shape allows, those that it loses, and the sizes that keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from helpers.public_configs import LLAMA_31_8B
from helpers.tiny import structure_of
from transformers import AutoConfig

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.anatomy.meta_model import build_meta_model
from llmprune.planning.next_tools.lost_tools import about_lost_tools, with_tokens_kept
from llmprune.planning.next_tools.tool_sizes import ToolSizes, cut_sizes, next_tools, sizes_for_tools
from llmprune.planning.plan_schema import Plan
from llmprune.planning.vocabulary.plan import VocabularyPlan
from llmprune.recipe.recipe import Recipe
from llmprune.recipe.width_rounding import K_QUANT_ROW
from llmprune.results.figures.next_tools import Degrees, NextTools, Rows
from llmprune.results.sentences.next_tools import describe_next_tools
from llmprune.testing import tiny_config

LLAMA = LLAMA_31_8B | {"num_hidden_layers": 2}
MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


def planned(folder: Path, config: dict[str, Any], *overrides: str) -> Plan:
    """Return the plan of a model's config."""
    (folder / "config.json").write_text(json.dumps(config))
    text = f"model: {{id: '{folder}'}}\ncalibration: {{dataset: text.txt}}\n"
    return structure_of(Recipe.parse(text, overrides))


def test_a_block_of_k_quants_is_that_of_the_format() -> None:
    """The block of Q4_K and Q6_K in the gguf package has the length that rows are checked for."""
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K):
        assert GGML_QUANT_SIZES[kind][0] == K_QUANT_ROW


def test_a_width_splits_groups_over_more_gpus_than_the_dense_one(tmp_path: Path) -> None:
    """10,752 neurons in groups of 128 divide over 4 GPUs and not over 8, where 14,336 do; the plan says what does."""
    plan = planned(tmp_path, LLAMA, "width.mlp=0.75")
    assert plan.keep_widths == {"intermediate_size": 10752}
    tools = plan.next_tools
    assert tools is not None
    assert tools.tensor_parallel == Degrees(allowed=(1, 2, 4, 8, 16), lost=())
    assert tools.groups[128] == tools.fp8_blocks == Degrees(allowed=(1, 2, 4), lost=(8, 16))
    assert tools.groups[32].lost == ()
    assert not tools.k_quants.broken
    (lost,) = plan.lost_tools
    assert "groups of 128 on 8 or 16" in lost
    assert lost.endswith("width.neurons 10240 or 12288 would keep it")


def test_an_odd_multiple_of_128_loses_k_quants() -> None:
    """Only the rows that the cut broke are lost; the nearest multiples of 256 keep them."""
    config = AutoConfig.for_model(**LLAMA)
    dense = sizes_for_tools(build_meta_model(config), discover(config))
    pruned = cut_sizes(dense, KeptSizes((), {"intermediate_size": 10880}))
    found = next_tools(dense, pruned)
    assert found.k_quants == Rows(broken={"mlp.down_proj": 10880}, lost={"mlp.down_proj": 10880})
    lost = about_lost_tools(found, dense=dense, pruned=pruned)
    assert any("mlp.down_proj (10,880 in a row)" in one and "10752 or 11008" in one for one in lost)
    kept = cut_sizes(dense, KeptSizes((), {"intermediate_size": 10240}))
    assert about_lost_tools(next_tools(dense, kept), dense=dense, pruned=kept) == []


def test_heads_and_experts_that_do_not_divide_are_lost(tmp_path: Path) -> None:
    """Three of four key-value groups and twelve of sixteen experts divide over fewer GPUs, each with its remedy."""
    plan = planned(tmp_path, MIXTURE, "width.heads=3", "experts.keep=12")
    tools = plan.next_tools
    assert tools is not None
    assert tools.tensor_parallel == Degrees(allowed=(1,), lost=(2, 4, 8, 16))
    assert tools.expert_parallel == Degrees(allowed=(1, 2, 4), lost=(8, 16))
    heads, experts = plan.lost_tools[:2]
    assert heads.endswith("; width.heads 2 or 4 would keep it")
    assert experts.endswith("; experts.keep 16 would keep it")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "deepseek_v3", "mamba2"])
def test_the_sizes_are_those_of_the_modules(family: str) -> None:
    """In every family cutting nothing loses nothing, and all rows are counted once."""
    config = tiny_config(family)
    model = build_meta_model(config)
    sizes = sizes_for_tools(model, discover(config))
    assert (sizes.hidden, sizes.vocabulary) == (config.hidden_size, config.vocab_size)
    same = cut_sizes(sizes, KeptSizes(()))
    narrower = cut_sizes(sizes, KeptSizes((), hidden=sizes.hidden - 8))
    assert {narrower.rows[name] for name, inputs in sizes.rows.items() if inputs == sizes.hidden} == {sizes.hidden - 8}
    found = next_tools(sizes, same)
    each = [found.tensor_parallel, found.vocabulary, *found.groups.values(), found.fp8_blocks]
    assert not any(one.lost for one in each)
    assert not found.k_quants.lost
    assert found.k_quants.broken.keys() >= sizes.rows.keys() | {name for name, _, _ in sizes.units}
    assert sizes.rows.keys().isdisjoint(name for name, _, _ in sizes.units)


def test_fewer_key_value_heads_than_gpus_are_repeated() -> None:
    """Two key-value heads divide over eight GPUs with eight query heads, three do not."""
    sizes = ToolSizes(
        hidden=1024, vocabulary=1000, units=(), widths={}, kv_groups=2, queries=4, head_dim=128, outputs={},
        experts=None, rows={},
    )  # fmt: skip
    assert [degree for degree in (1, 2, 4, 8, 16) if sizes.tensor_parallel(degree)] == [1, 2, 4, 8]
    assert sizes.in_blocks(8)


def test_the_clauses_name_what_is_lost() -> None:
    """Sizes of groups with the same degrees are one clause; nothing allowed is said in words."""
    some, none = Degrees(allowed=(1, 2), lost=(4,)), Degrees(allowed=(), lost=())
    tools = NextTools(
        tensor_parallel=some, expert_parallel=None, vocabulary=some, groups={32: some, 64: some, 128: none},
        fp8_blocks=none, k_quants=Rows(broken={"a": 384, "b": 576, "c": 576}, lost={"a": 384}),
    )  # fmt: skip
    assert describe_next_tools(tools) == [
        "tensor parallelism on 1 or 2 GPUs (lost: 4)",
        "quantisation in groups of 32 or 64 on 1 or 2 GPUs (lost: 4); of 128 not at all; in FP8 blocks of 128 not at "
        "all",
        "k-quants of llama.cpp for all matrices but a (384 in a row, lost); b, c (576 in a row)",
    ]


def test_fewer_tokens_divide_over_fewer_gpus(tmp_path: Path) -> None:
    """The degrees are those of the tokens kept, and the note names the multiple that keeps them."""
    plan = planned(tmp_path, LLAMA, "width.mlp=0.75")
    vocabulary = VocabularyPlan(tokens=128_256, kept=64_004, parameters_of_token=8192, bytes_of_token=16_384)
    found = with_tokens_kept(plan, vocabulary)
    assert found.next_tools is not None
    assert found.next_tools.vocabulary == Degrees(allowed=(1, 2, 4), lost=(8, 16))
    assert "vocabulary.multiple 16 would keep it" in found.lost_tools[-1]
    assert with_tokens_kept(plan, vocabulary.model_copy(update={"kept": 64_000})).lost_tools == plan.lost_tools
