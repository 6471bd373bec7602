"""A small model whose layers matter differently, and token windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.testing import tiny_model

LAYERS = 5


@pytest.fixture(scope="package")
def model() -> PreTrainedModel:
    """A random model of five layers with output projections of different sizes."""
    made = tiny_model("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for index, layer in enumerate(made.model.layers):
            layer.mlp.down_proj.weight.mul_(1 + 4 * ((index * 2) % LAYERS))
    return made


@pytest.fixture(scope="package")
def windows() -> Tensor:
    """Token windows [N, L]."""
    return torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(3))
