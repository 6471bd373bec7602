"""Limits on the size of a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, DeepseekV3Config, Gemma3nTextConfig, LlamaConfig

from llmprune import ModelError
from llmprune.checkpoint.config_limits import MOST_BYTES, check_config
from llmprune.checkpoint.loading import load_config, load_tokenizer
from llmprune.recipe.model import ModelSource

MB = 10**6


LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 5_000_000}, "num_hidden_layers is 5,000,000 and the most is 1,024"),
        ({"n_layer": 1025}, "n_layer is 1,025"),
        ({"num_hidden_layers": 5e6}, "num_hidden_layers is 5,000,000"),
        ({"text_config": {"vision_config": {"depth": 10**7}}}, "text_config.vision_config.depth is 10,000,000"),
        ({"hidden_size": 10**12}, "hidden_size is 1,000,000,000,000"),
        ({"intermediate_size": [64, 10**9]}, "intermediate_size is 1,000,000,000"),
        ({"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000 and the most is 67,108,864"),
        ({"num_experts": 10**6}, "num_experts is 1,000,000 and the most is 65,536"),
        ({"num_attention_heads": 10**6}, "num_attention_heads is 1,000,000"),
        ({"num_labels": 10**9}, "num_labels is 1,000,000,000"),
        ({"num_codebooks": 10**9}, "num_codebooks is 1,000,000,000 and the most is 16,777,216"),
        ({"moe_intermediate_size": 10**9}, "moe_intermediate_size is 1,000,000,000"),
        ({"kv_lora_rank": 10**9}, "kv_lora_rank is 1,000,000,000"),
        ({"d_ff": 10**9}, "d_ff is 1,000,000,000"),
        ({"mamba_expand": 10**9}, "mamba_expand is 1,000,000,000"),
        ({"conv_L_cache": 10**9}, "conv_L_cache is 1,000,000,000"),
        ({"first_k_dense_replace": 10**9}, "first_k_dense_replace is 1,000,000,000"),
        ({"multiple_of": 10**9}, "multiple_of is 1,000,000,000"),
        ({"head_dim": 10**4000}, "head_dim is more than 10^18"),
        ({"layer_types": ["full"] * 10**5}, "layer_types has 100,000 entries and the most is 65,536"),
        ({"rope_scaling": {"short_factor": [1.0] * 10**5}}, "rope_scaling.short_factor has 100,000 entries"),
        ({"configuration_files": ["config.4.0.0.json"]}, "names other files"),
    ],
)
def test_a_config_beyond_every_model_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], said: str
) -> None:
    """With a sentence, before transformers makes lists of layers or a model of it; also where a tokenizer is loaded."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("the config was read"))
    for load in (load_config, load_tokenizer):
        with pytest.raises(ModelError) as refused:
            load(ModelSource(id=str(tmp_path)))
        assert said in str(refused.value)
        assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested hundreds deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "is nested deeper and the most is 32 levels"),
        (f'{{"a": "{"x" * MOST_BYTES}"}}', "it has 8 MB and the most is 8 MB"),
        (f'{{"{"k" * 1_000_000}": {{"hidden_layers": 5000}}}}', "hidden_layers is 5,000"),
    ],
)
def test_a_file_beyond_every_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """By its size and its nesting; a key of a megabyte is not repeated in the sentence."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said) as refused:
        load_config(ModelSource(id=str(tmp_path)))
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=126, hidden_size=16_384, intermediate_size=53_248, vocab_size=128_256).to_dict(),
        DeepseekV3Config().to_dict(),
        Gemma3nTextConfig().to_dict(),
        {"num_hidden_layers": 315, "num_experts": 16_384, "vocab_size": 20_000_000, "num_labels": 50_257},
        {"rope_theta": 10**10, "max_position_embeddings": 10**30, "sliding_window": 2**63, "seed": 2**40},
        {"num_parameters": 7 * 10**10, "total_params": 10**12, "non_embedding_params": 10**11, "model_size": 7 * 10**9},
        {"train_tokens": 15 * 10**12, "num_tokens": 10**12, "num_input_tokens_seen": 10**12, "training_steps": 10**8},
        {"num_train_samples": 10**9, "dataset_size": 10**10, "total_size": 10**11, "train_batch_size": 2**25},
        {"created": 1_767_225_600, "timestamp": 1_767_225_600_000, "layer_rope_theta": 10**9, "total_flos": 10**24},
        {"max_seq_len": 10**9, "n_ctx": 10**9, "model_max_length": 10**30, "chunk_size": 10**9, "window_size": 10**9},
        {"time_step_limit": [0.0, float("inf")], "mask_value": -1e30, "attention_multiplier": 1e9},
        {"quantization_config": {"ignore": [f"model.layers.{n}.mlp.gate" for n in range(60_000)]}},
        {"id2label": {str(n): f"label {n}" for n in range(21_843)}},
        ["no", "mapping"],
    ],
)
def test_configs_of_the_largest_models_pass(config: Any) -> None:
    """Several times the largest published sizes, and numbers that are no sizes however large."""
    check_config(json.loads(json.dumps(config, default=str)), "model")
