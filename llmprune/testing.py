"""Tiny random models for tests, of any family that transformers can build from a config.

    from llmprune.testing import tiny_model
    model = tiny_model("qwen3")           # float32, four layers, hidden size 32

They have the structure of the family and none of its knowledge.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 128

# What most families call their sizes; a family that lacks a name ignores it.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_HEAD_DIM: dict[str, Any] = {"head_dim": None}

# Families whose configs have other names, or constraints between sizes.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 96, "intermediate_size": None},
    "falcon": {"ffn_hidden_size": 96, "num_kv_heads": 2, "new_decoder_architecture": True} | _NO_HEAD_DIM,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32} | _NO_HEAD_DIM,
    "phi": _NO_HEAD_DIM,
    "phi3": _NO_HEAD_DIM,
    "gpt_neox": _NO_HEAD_DIM,
    "stablelm": _NO_HEAD_DIM,
    "starcoder2": _NO_HEAD_DIM,
    "bloom": {"n_layer": 4, "n_head": 4} | _NO_HEAD_DIM,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 128, "expansion_ratio": 3} | _NO_HEAD_DIM,
    "mamba": {"state_size": 8},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1, 3]} | _NO_HEAD_DIM,
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 96,
    }
    | _NO_HEAD_DIM,
    "deepseek_v3": {
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "cohere2": {"sliding_window": 16},
}
_HAS_NO = {name: tuple(key for key, value in special.items() if value is None) for name, special in _SPECIAL.items()}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The config of a tiny model of this ``model_type``; ``overrides`` are config fields."""
    fields = _COMMON | _SPECIAL.get(family, {}) | overrides
    for name in _HAS_NO.get(family, ()):
        if fields.get(name) is None:
            fields.pop(name, None)
    return AutoConfig.for_model(family, **fields)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model on the CPU, in evaluation mode. Equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # families start with tiny or zero weights: make every one count
            if parameter.ndim > 1:
                torch.manual_seed(seed)
                parameter.normal_(std=1 / parameter.shape[-1] ** 0.5)
    return model.eval().requires_grad_(False)
