"""Make tiny random models for tests, of any family that transformers can build from a config.

    from llmprune.testing import tiny_model
    model = tiny_model("qwen3")           # float32, four layers, hidden size 32

They have the structure of the family and random weights.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from llmprune.anatomy.meta_model import auto_class

VOCABULARY = 128

# Sizes by the name of a config field; the first pattern that matches the whole name decides. No size is increased.
_SIZES = (
    (r"\w*vocab_size\w*|\w*hash\w*vocab", VOCABULARY),
    (r"\w*position_embeddings|n_positions|n_ctx|max_seq_len|max_\w+_positions|context_length", 128),
    (r"num_hidden_layers|n_layers?|num_layers|num_decoder_layers|decoder_layers", 4),
    (r"\w*encoder_layers|\w*num_hidden_layers|depth|num_blocks", 2),
    (r"\w*head_dim|attention_head_size|dim_head|kv_channels|rotary_dim", 8),
    (r"\w*(key_value|kv)_heads", 2),
    (r"\w*heads?", 4),
    (r"\w*experts_per_tok\w*|(moe_|router_)?top_?k|top_k_experts|moe_k", 2),
    (r"\w*experts|\w*expert_num", 4),
    (r"\w*n_?groups?|topk_group", 1),
    (r"(moe|expert)_\w*(intermediate_size|ffn_hidden_size)", 48),
    (r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|feed_forward_size|d_inner|dff|dim_ff|n_inner|mlp_dim", 96),
    (r"\w*hidden_size\w*|d_model|n_embd|emb_dim|\w*embedding_size|hidden_dim|\w*(embed|proj|output|input)_dims?", 32),
    (r"\w*rank", 16),
    (r"index_topk|\w*state_size|\w*d_state", 8),
    (r"\w*(chunk_size|chunk_length|block_size)|\w*(sliding_window|window_size|window_len)\w*|local_attention", 16),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"pad_token_id", 0),
    (r"\w*_token_(id|index)|\w*_id", 2),
)

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_TWO_KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# Families with constraints between sizes, or whose defaults differ from their published models.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "cohere_compass_text": {
        "layer_types": _TWO_KINDS,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in _TWO_KINDS},
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_routed_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon": {"ffn_hidden_size": 96, "num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _TWO_KINDS},
    "gpt2": {"n_inner": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_d_head": 16,
        "num_local_experts": 4,
        "shared_intermediate_size": 96,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "mpt": {"expansion_ratio": 3},
    "glm4v_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "rwkv": {"rescale_every": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the config of a tiny model. ``family``: a ``model_type`` of transformers; ``overrides``: config fields."""
    config_class = CONFIG_MAPPING[family]
    asked = {config_class.attribute_map.get(name, name): value for name, value in overrides.items()}
    return AutoConfig.for_model(family, **_small_fields(config_class) | asked)


def _small_fields(config_class: type[PretrainedConfig], given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return small values for the fields of a config class and its parts; ``given`` replaces its defaults."""
    defaults = {field.name: field.default for field in fields(config_class)} | (given or {})
    small = (given or {}) | {name: _small(name, value) for name, value in defaults.items() if type(value) is int}
    for name, size in (("head_dim", 8), ("num_key_value_heads", 4 if "kv_lora_rank" in defaults else 2)):
        if name in defaults:
            small[name] = size
    if defaults.get("is_decoder") is False:  # an encoder that can attend causally
        small["is_decoder"] = True
    for name, part in config_class.sub_configs_defaults.items():
        part_class = part.get_config_class(part.model_type) if part.config_class is AutoConfig else part.config_class
        small[name] = {"model_type": part.model_type} | _small_fields(part_class, part.init_kwargs)
    return small | _SPECIAL.get(config_class.model_type, {})


def _small(name: str, value: int) -> int:
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)
    return min(value, size) if size else size


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make a random float32 model on the CPU, in evaluation mode. Equal seeds give equal weights."""
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # some families start with tiny or zero weights
                if parameter.ndim > 1:
                    parameter.normal_(std=1 / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)
