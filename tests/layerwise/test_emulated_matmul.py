"""Half precision on CPUs without instructions for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.decoders import dense_decoder

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.meta_model import find_layers
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.emulated_matmul import is_emulated, quick_products
from llmprune.prune.pass2 import Pruning
from llmprune.recipe.refit import Refit
from llmprune.testing import VOCABULARY, tiny_model


@pytest.fixture(params=[True, False])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Report a CPU without products in bfloat16, and one with them."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not request.param)
    is_emulated.cache_clear()
    assert is_emulated(torch.bfloat16) == request.param
    yield bool(request.param)
    is_emulated.cache_clear()


def test_quick_products_round_once(emulated: bool) -> None:
    """Quick products sum in float32 and round the result; float32 products are unchanged."""
    value, weight, bias = (torch.randn(*shape) for shape in ((3, 64), (8, 64), (8,)))
    exact = torch.nn.functional.linear(value, weight, bias)
    with quick_products():
        assert torch.equal(torch.nn.functional.linear(value, weight, bias), exact)
        half = torch.nn.functional.linear(value.bfloat16(), weight.bfloat16(), bias=bias.bfloat16())
    rounded = torch.nn.functional.linear(*(part.bfloat16().float() for part in (value, weight, bias))).bfloat16()
    torch.testing.assert_close(half, rounded)


def test_pruned_hidden_states_are_those_of_a_reload(emulated: bool) -> None:
    """However dense layers are computed, the pruned logits are bit-equal to the pruned model's own forward pass."""
    model = tiny_model("llama").to(torch.bfloat16)
    dense, anatomy, cut = dense_decoder(model), discover(model.config), Cut(4, (0, 1, 3))
    ids_NL = torch.randint(3, VOCABULARY, (2, 16))
    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    written = {}
    _, end = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=Refit(), write=written.__setitem__).run(ids_NL, 2)
    again = pruned.skeleton
    _, layers = find_layers(again)
    for index, tensors in written.items():
        layers[index].load_state_dict(tensors, assign=True)
    with torch.no_grad():
        assert torch.equal(end.logits(0), again(ids_NL, use_cache=False).logits)
