"""Order of neurons and value channels: free in every kind of layer, and chosen for the pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from torch import Tensor

from llmprune.anatomy.discovery import discover
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.methods.magnitude import Magnitude
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(0))
BOTH = {"value", "neurons"}
# grouped queries; fused blocks; Conv1D; fused head by head; latent attention; experts, which keep their order
FAMILIES = {"llama": BOTH, "phi3": BOTH, "gpt2": BOTH, "falcon": BOTH, "deepseek_v3": BOTH, "mixtral": {"value"}}


class _KeepAll(Magnitude):
    """A sparsity method that prunes nothing and finds every order as good as another."""

    def prune(self, weight_OI: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return weight_OI, torch.ones_like(weight_OI, dtype=torch.bool)

    def importance(self, weight_OI: Tensor, moments: Tensor | None) -> Tensor:
        return torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(0))


def _prune(
    family: str,
    sparsity: Sparsity,
    refit: Refit | None = None,
) -> tuple[dict[int, Tensors], list[LayerRecord]]:
    """Run pass 2 over two layers; return the written layers and the records."""
    model = tiny_model(family, num_hidden_layers=2)
    anatomy, dense, cut = discover(model.config), dense_decoder(model), Cut(2, (0, 1))
    written: dict[int, Tensors] = {}

    def write(index: int, tensors: Tensors) -> None:
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    pruning = Pruning(dense, pruned, anatomy=anatomy, cut=cut, refit=refit, write=write, sparsity=sparsity)
    records, _ = pruning.run(WINDOWS, 4)
    return written, records


def _one_of_four(**settings: Any) -> Sparsity:
    return Sparsity.model_validate({"pattern": "1:4", **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_model_has_the_logits_of_the_dense_one(family: str) -> None:
    """Neurons and value channels get another order where they may, and the layers as written compute the same."""
    sparsity = _one_of_four().model_copy(update={"method": _KeepAll()})
    written, records = _prune(family, sparsity)
    model = tiny_model(family, num_hidden_layers=2)
    with torch.no_grad():
        before = model(WINDOWS[:4]).logits
        layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        moved = {
            f"{index}.{name}"
            for index, tensors in written.items()
            for name, value in layers[index].state_dict().items()
            if name in tensors and not torch.equal(tensors[name], value)
        }
        for index, tensors in written.items():
            layers[index].load_state_dict(tensors)
        after = model(WINDOWS[:4]).logits
    assert torch.allclose(after, before, atol=1e-5)
    permuted = {matrix.name for record in records for matrix in record.matrices if matrix.permuted}
    is_mlp = ["mlp" in name or "fc" in name for name in permuted]
    assert {"neurons" if mlp else "value" for mlp in is_mlp} == FAMILIES[family]
    assert {f"0.{name}.weight" for name in permuted if "shared" not in name} <= moved


def test_the_order_lowers_the_error_of_a_pattern() -> None:
    """Matrices with an order of their own have a lower relative error, in each layer."""
    errors = {}
    for permute in (False, True):
        _, records = _prune("llama", _one_of_four(permute=permute), Refit())
        errors[permute] = [
            matrix.error for record in records for matrix in record.matrices if matrix.name == "mlp.down_proj"
        ]
        assert any(matrix.permuted for record in records for matrix in record.matrices) is permute
    for before, after in zip(errors[False], errors[True], strict=True):
        assert before is not None
        assert after is not None
        assert after < before
