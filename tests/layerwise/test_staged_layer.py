"""A layer in stages: the order of its projections, and outputs equal to those of the whole layer."""

from __future__ import annotations

import pytest
import torch
from helpers.decoders import dense_decoder

from llmprune.anatomy.projections import projections_of
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.layerwise.staged_layer import StagedLayer, probe
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "gpt2", "gemma2", "opt", "falcon", "phi", "granite", "mixtral", "qwen2_moe", "bloom", "mamba")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_stages_is_the_layer(family: str) -> None:
    """A layer run up to each projection in turn, with finished modules cached, has the outputs of a plain run."""
    decoder = dense_decoder(tiny_model(family))
    forward = LayerwiseForward(decoder, WINDOWS, batch_size=4)
    with decoder.layer(0) as layer:
        names = [one.name for one in projections_of(layer)]
        staged = StagedLayer(forward, 0, layer=layer, order=probe(forward, 0, layer=layer, names=names))
        whole = [output_BLD.clone() for *_, output_BLD in forward.outputs(0, layer)]
        for group in staged.order.groups:
            for name in group:
                batches = [batch for batch, _ in staged.inputs(name, keep=True)]
                assert batches == [0, 1, 2]
                staged.finish(name)
        for (_, output_BLD), expected_BLD in zip(staged.outputs(), whole, strict=True):
            assert torch.equal(output_BLD, expected_BLD)
        assert not any("forward" in module.__dict__ for module in layer.modules() if module is not layer)


def test_order_of_a_llama_layer() -> None:
    """Queries, keys and values share an input, as do gate and up; attention and MLP end with a projection."""
    decoder = dense_decoder(tiny_model("llama"))
    forward = LayerwiseForward(decoder, WINDOWS, batch_size=4)
    with decoder.layer(0) as layer:
        order = probe(forward, 0, layer=layer, names=[one.name for one in projections_of(layer)])
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    assert order.groups == (attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
    assert {name: owner.path for name, owner in order.owners.items()} == {
        "self_attn.o_proj": "self_attn",
        "mlp.down_proj": "mlp",
    }
