"""Key-value cache of a token in the plan: measured on one layer of each kind."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.kept_sizes import KeptSizes
from llmprune.planning.sizes.model_size import measure_size
from llmprune.testing import tiny_model


def _bytes_after(model: PreTrainedModel, length: int) -> int:
    cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor.ndim > 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "bamba", "lfm2", "deepseek_v3", "gpt2"])
@torch.no_grad()
def test_cache_of_a_token_is_that_of_a_real_one(family: str) -> None:
    """The planned bytes are those by which the cache of the model with weights grows, also with kinds of layers."""
    model = tiny_model(family)
    planned = measure_size(model, KeptSizes.of_dense(discover(model.config)), stored={}).kv_bytes_per_token
    assert planned == _bytes_after(model, 3) - _bytes_after(model, 2) > 0
