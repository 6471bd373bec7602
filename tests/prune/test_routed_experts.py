"""Routed experts in pass 2: refit and sparsity over the tokens that each of them gets."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.expert_hooks import choice_in
from llmprune.anatomy.stacked_projections import stacked_projections
from llmprune.anatomy.types import Anatomy, unit_key
from llmprune.common.linalg.gram import add_gram, mirror
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.routed_tokens import RoutedTokens
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.methods.sparsegpt import SparseGPT
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (16, 24), generator=torch.Generator().manual_seed(0))
# A router of groups with shared experts, one with biases and transposed stacks, one with neither.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 2},
    "deepseek_v3": {"n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_hidden_layers": 2},
}
KEPT = {"mixtral": [0, 1, 3], "gpt_oss": [0, 1, 3], "deepseek_v3": [0, 2, 4, 5]}


@cache
def _model(family: str) -> tuple[PreTrainedModel, Anatomy]:
    model = tiny_model(family, **FAMILIES[family])
    return model, discover(model.config)


def _prune(family: str, cut_experts: bool, *, ids_NL: Tensor = IDS, **settings: Any) -> tuple[Any, list[LayerRecord]]:
    model, anatomy = _model(family)
    dense, keep = dense_decoder(model), torch.tensor(KEPT[family])
    layers = tuple(range(anatomy.num_layers))
    keys = [unit_key(index, block.path) for index, block in enumerate(anatomy.blocks) if block]
    experts = dict.fromkeys(keys, keep) if cut_experts else {}
    cut = Cut(len(layers), layers, {}, {}, len(keep) if cut_experts else None, experts)
    pruned, written = cut_decoder(dense, anatomy=anatomy, cut=cut), dict[int, Tensors]()

    def write(index: int, tensors: Tensors) -> None:
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records, forward = Pruning(dense, pruned, anatomy=anatomy, cut=cut, write=write, **{"refit": None} | settings).run(
        ids_NL, 4
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return (model, anatomy, written, forward), records


@pytest.mark.parametrize("family", FAMILIES)
def test_the_refit_brings_hidden_states_closer(family: str) -> None:
    """After experts are removed, those left are refit in every mixture, and the error after the last layer falls."""
    (*_, cut_only), _ = _prune(family, True)
    (model, anatomy, written, refit), records = _prune(family, True, refit=Refit())
    mixtures = [index for index, block in enumerate(anatomy.blocks) if block]
    assert all(records[index].experts is not None and records[index].experts.refit for index in mixtures)
    assert all((records[index].experts.held_out or 0) < 0 for index in mixtures)
    assert written.keys() == set(range(anatomy.num_layers))
    with torch.no_grad():
        dense_NLV = model(IDS[:4], use_cache=False).logits
    errors = [float((one.logits(0) - dense_NLV).norm()) for one in (cut_only, refit)]
    assert errors[1] < 0.9 * errors[0]


def test_an_expert_without_tokens_in_a_batch_has_as_many_neurons_as_are_kept() -> None:
    """No rows of activations are as wide as those of the other experts of a narrowed layer."""
    model, anatomy = _model("mixtral")
    (unit,) = anatomy.units[0]
    neurons = {unit_key(index, unit.path): torch.arange(8).expand(4, 8) for index in range(2)}
    narrow = cut_decoder(dense_decoder(model), anatomy=anatomy, cut=Cut(2, (0, 1), {unit.field: 8}, neurons))
    forward = LayerwiseForward(narrow, IDS[:2], batch_size=2)
    tokens = RoutedTokens(forward, unit)
    with narrow.layer(0) as layer:
        with tokens.recorded(layer):
            forward.pass_through(0, layer)
        assert tokens.activations(layer, 0, hidden_TD=torch.zeros(0, 32)).shape == (0, 8)


def test_experts_with_few_tokens_stay_as_they_are() -> None:
    """Of two windows no expert has as many tokens as neurons: none is changed, and the record says why."""
    (_, _, without, _), _ = _prune("mixtral", True, ids_NL=IDS[:2])
    (_, _, written, _), records = _prune("mixtral", True, ids_NL=IDS[:2], refit=Refit())
    assert {(one.experts.refit, one.experts.few_tokens) for one in records if one.experts} == {(0, 3)}
    name = "mlp.experts.down_proj"
    assert all(torch.equal(written[index][name], without[index][name]) for index in written)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_expert_gets_the_pattern(family: str) -> None:
    """Stacks in any layout get the pattern along their inputs; what is left is solved again."""
    sparsity = Sparsity.model_validate({"pattern": "2:8", "method": {"kind": "sparsegpt"}})
    (model, anatomy, written, _), records = _prune(family, False, refit=Refit(), sparsity=sparsity)
    index = anatomy.num_layers - 1
    layer = model.model.layers[index]
    stacks = stacked_projections(layer, anatomy.units[index])
    assert len(stacks) == 2
    assert {stack.name for stack in stacks} <= {one.name for one in records[index].matrices}
    for stack in stacks:
        for expert in range(stack.experts):
            matrix_OI = stack.matrix(written[index][stack.name], expert)
            assert ((matrix_OI != 0).reshape(-1, 8).sum(1) <= 2).all()
            assert matrix_OI.isfinite().all()
            assert matrix_OI.any()


def test_an_expert_is_pruned_on_the_inputs_of_its_own_tokens() -> None:
    """The result of an expert is that of the method with XᵀX over its tokens, weighted by the routing."""
    method = SparseGPT(kind="sparsegpt")
    sparsity = Sparsity.model_validate({"pattern": "4:8", "method": {"kind": "sparsegpt"}, "targets": ["gate_up_proj"]})
    (model, _, written, _), _ = _prune("mixtral", False, sparsity=sparsity)
    dense = dense_decoder(model)
    grams = torch.zeros(4, 32, 32)

    def see(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        choice = choice_in(args, kwargs)
        assert choice is not None
        for expert in range(4):
            token_T, place_T = (choice.index_TK == expert).nonzero(as_tuple=True)
            weight_T1 = choice.weight_TK[token_T, place_T].unsqueeze(1)
            add_gram(grams[expert], choice.hidden_TD[token_T] * weight_T1)

    forward = LayerwiseForward(dense, IDS, batch_size=4)
    with dense.layer(0) as layer:
        handle = layer.get_submodule("mlp.experts").register_forward_pre_hook(see, with_kwargs=True)
        forward.pass_through(0, layer)
        handle.remove()
    for expert in range(4):
        mirror(grams[expert])
        gram_II = grams[expert]
        gram_II.diagonal().add_(0.01 * gram_II.diagonal().mean())
        weight_OI = model.model.layers[0].mlp.experts.gate_up_proj[expert]
        wanted_OI, _ = method.prune(weight_OI, gram_II, pattern=sparsity.parsed)
        torch.testing.assert_close(written[0]["mlp.experts.gate_up_proj"][expert], wanted_OI, rtol=1e-3, atol=1e-4)
