"""Architectures that the converter of llama.cpp registers, as config.json names them.

Source: the table of text models in conversion/__init__.py of github.com/ggml-org/llama.cpp, commit 00bdaa1; of it the
decoders that transformers has too. A later converter may know more.
"""

from __future__ import annotations

_FOR_CAUSAL_LM = """
    Afmoe Apertus Arcee Bamba Bloom Cohere Cohere2 Cohere2Moe Dbrx DeepseekV2 DeepseekV3 DeepseekV32 Dots1 Ernie4_5
    Ernie4_5_Moe Exaone4 Falcon FalconH1 FalconMamba GPTBigCode GPTNeoX Gemma Gemma2 Gemma3 Gemma3n Gemma4 Glm Glm4
    Glm4Moe Glm4MoeLite GlmMoeDsa GptOss Granite GraniteMoe GraniteMoeHybrid GraniteMoeShared HunYuanDenseV1
    HunYuanMoEV1 Jais2 Jamba KimiLinear Lfm2 Lfm2Moe Llama Llama4 Mamba Mamba2 Mellum MiMoV2Flash MiniCPM3 MiniMaxM2
    Ministral3 Mistral Mixtral Nemotron NemotronH Olmo Olmo2 Olmo3 Olmoe Phi Phi3 Qwen2 Qwen2Moe Qwen3 Qwen3Moe
    Qwen3Next Qwen3_5 Qwen3_5Moe SeedOss SmolLM3 SolarOpen StableLm Starcoder2
"""
_OTHERS = """
    GPT2LMHeadModel Gemma3ForConditionalGeneration Gemma3nForConditionalGeneration Gemma4ForConditionalGeneration
    Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Llama4ForConditionalGeneration
    Mistral3ForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForConditionalGeneration
"""
ARCHITECTURES = frozenset(f"{name}ForCausalLM" for name in _FOR_CAUSAL_LM.split()) | frozenset(_OTHERS.split())
