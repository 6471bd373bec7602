"""Measurement of how a projection reaches the residual stream."""

from __future__ import annotations

import torch
from helpers.decoders import dense_decoder

from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.residual_scale import residual_scale
from llmprune.testing import VOCABULARY, tiny_model


def test_a_factor_that_is_not_a_number_is_none() -> None:
    """With hidden states of zeros the measured scale is NaN, and None is returned."""
    model = tiny_model("llama")
    windows_NL = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    forward = LayerwiseForward(dense_decoder(model), windows_NL, batch_size=2)
    layer = model.model.layers[0]
    assert residual_scale(forward, 0, layer=layer, output=layer.mlp.down_proj) == 1.0
    forward.hidden_states[0] = torch.zeros_like(forward.hidden_states[0])
    assert residual_scale(forward, 0, layer=layer, output=layer.mlp.down_proj) is None
