"""Families of models by what can be pruned of them, and how plain transformers reload the results."""

from __future__ import annotations

DEPTH_AND_WIDTH = [
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "glm4",
    "olmo2",
    "granite",
    "smollm3",
    "cohere2",
    "exaone4",
    "seed_oss",
    "stablelm",
    "starcoder2",
    "nemotron",
    "gpt2",
    "gpt_neox",
    "falcon",
    "opt",
    "lfm2",
    "bamba",
]


MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "qwen3_next",
    "granitemoehybrid",
    "nemotron_h",
    "jamba",
]


# Config fields beyond the tiny ones, and the layers removed, where kinds follow from a layer's index: a period that a
# cut states as a list, and one that it keeps.
FIELDS = {"qwen2_moe": {"decoder_sparse_step": 2}, "jamba": {"num_hidden_layers": 5}}
REMOVED = {"qwen2_moe": (1,), "jamba": (1, 2)}


# Config fields of a router of three groups of four experts, of which it chooses two first.
GROUPED = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 2}


# One family of each way to build a layer, for tests that run a layer and need not know its names: norms before, behind
# and on both sides, parallel attention and MLP, fused projections, Conv1D, multipliers, convolutions, state spaces,
# shared and routed experts, latent and linear attention, layers of one mixer.
DISTINCT = [
    *("llama", "gemma2", "exaone4", "gpt_neox", "falcon", "phi3", "gpt2", "granite", "lfm2", "bamba"),
    *("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "qwen3_next", "nemotron_h"),
]


DEPTH_ONLY = [
    "mamba",
    "bloom",
    "mpt",
]


KEPT_LAYERS, KEPT_WIDTHS = 3, {96: 64, 48: 32, 64: 48, 256: 192}


# Of these no config expresses fewer heads of the same size, or what is left would change with what went.
WHOLE_HEADS = {
    "bloom": "would not reload",
    "falcon": "would not reload",
    "gpt2": "would not reload",
    "gpt_neox": "would not reload",
    "mpt": "would not reload",
    "olmo2": "not the same when groups of heads are cut as when they are masked",  # a norm over all heads
    "olmoe": "does not run",  # a norm over all heads as wide as the hidden states
    "opt": "would not reload",
    "stablelm": "would not reload",
}


# Plain transformers in a process of its own: no llmprune. Reads folders, writes logits and generations beside them.
RELOAD = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
assert "llmprune" not in sys.modules
for folder in map(Path, sys.argv[1:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", output_loading_info=True, dtype="auto")
    ids = load_file(folder / "ids.safetensors")["ids"]
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
        prompt = {"input_ids": ids[:1, :8], "attention_mask": torch.ones_like(ids[:1, :8])}
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        texts = [model.generate(**prompt, **options, use_cache=cached).tolist() for cached in (True, False)]
    save_file({"logits": logits}, folder / "logits.safetensors")
    keys = {kind: len(value) for kind, value in info.items() if value}
    (folder / "reloaded.json").write_text(json.dumps({"keys": keys, "cached": texts[0], "uncached": texts[1],
                                                      "parameters": sum(p.numel() for p in model.parameters())}))
"""
