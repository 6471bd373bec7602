"""Tiny models with random weights."""

from __future__ import annotations

from itertools import combinations

import torch

from llmprune.testing import tiny_model


def test_layers_of_a_tiny_model_differ() -> None:
    """Weights differ between layers, matrices and seeds; equal seeds give equal weights."""
    one, same, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    matrices = [value for name, value in one.named_parameters() if name.endswith(("k_proj.weight", "v_proj.weight"))]
    matrices += [other.model.layers[0].self_attn.k_proj.weight]
    assert all(not torch.equal(first, second) for first, second in combinations(matrices, 2))
