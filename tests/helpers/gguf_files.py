"""Tiny models in GGUF files, as llama.cpp's converter lays them out, whole or split."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel

from helpers.tiny import tiny_tokenizer

_MERGED = 258  # id of a token that a merge makes; a file without merges would be read as SentencePiece


def write_gguf(path: Path, model: PreTrainedModel, *, tensors_of_part: int = 0) -> Path:
    """Write a llama as ``path``, or as parts of so many tensors beside it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_of_part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp rotates neighbours, transformers the two halves of a head
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = {index: token for token, index in tiny_tokenizer().get_vocab().items()} | {_MERGED: "he"}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([1 if index in tokens else 5 for index in range(size)])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(256)
