"""Sparsity as a stage of pass 2: in every kind of layer, with and without cuts, stopped and continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.projections import projections_of
from llmprune.common.errors import NumericalError
from llmprune.cut.apply import cut_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.hidden_states.store import HiddenStateStore
from llmprune.prune.pass2 import Pruning
from llmprune.prune.records import LayerRecord
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.refit import Refit
from llmprune.recipe.sparsity import Sparsity
from llmprune.sparsity.methods.magnitude import Magnitude
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "gpt2", "gemma2", "opt", "falcon", "phi", "granite", "mixtral", "qwen2_moe", "bloom", "mamba")
TWO_OF_EIGHT: dict[str, Any] = {"pattern": "2:8"}


class _Stopped(Exception):
    pass


def _prune(
    family: str,
    sparsity: dict[str, Any] | Sparsity,
    layers: tuple[int, ...] = (0, 1, 3),
    refit: Refit | None = Refit(),  # noqa: B008  # frozen
    snapshots: Snapshots | None = None,
    store: HiddenStateStore | None = None,
    stop_at: int | None = None,
) -> tuple[dict[int, Tensors], list[LayerRecord], torch.Tensor]:
    """Run pass 2 with sparsity; return the written layers, the records, and the final logits of the first batch."""
    model = tiny_model(family, num_hidden_layers=4)
    anatomy, dense = discover(model.config), dense_decoder(model)
    cut = Cut(4, layers)
    written: dict[int, Tensors] = {}

    def write(index: int, tensors: Tensors) -> None:
        if index == stop_at:
            raise _Stopped
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    pruned = cut_decoder(dense, anatomy=anatomy, cut=cut)
    pruning = Pruning(
        dense, pruned, anatomy=anatomy, cut=cut, refit=refit, write=write, sparsity=Sparsity.model_validate(sparsity)
    )
    records, forward = pruning.run(WINDOWS, 4, snapshots=snapshots, store=store)
    return written, records, forward.logits(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_pattern(family: str) -> None:
    """Every projection but routers has the pattern along its inputs, with a layer removed, and logits are finite."""
    written, records, logits = _prune(family, TWO_OF_EIGHT)
    assert torch.isfinite(logits).all()
    layer = _first_layer(family)
    transposed = {one.name: one.transposed for one in projections_of(layer)}
    for new, record in enumerate(records):
        assert record.matrices
        assert record.error_refit is not None
        for matrix in record.matrices:
            stack = written[new].get(matrix.name)  # of experts, whose inputs are the last dimension
            weight = written[new][f"{matrix.name}.weight"] if stack is None else stack
            weight_OI = weight.T if transposed.get(matrix.name) else weight
            assert ((weight_OI != 0).reshape(-1, 8).sum(1) <= 2).all()
            assert matrix.kept == pytest.approx(0.25, abs=0.01)


class _Broken(Magnitude):
    """A sparsity method that returns NaN."""

    def prune(self, weight_OI: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return weight_OI * torch.nan, torch.ones_like(weight_OI, dtype=torch.bool)


def test_sparse_weights_that_are_not_finite_are_named() -> None:
    """A method that returns NaN is an error that names the matrices, the layer and the method."""
    sparsity = Sparsity.model_validate(TWO_OF_EIGHT).model_copy(update={"method": _Broken()})
    with pytest.raises(NumericalError, match=r"method magnitude: weights of self_attn\.q_proj, .* in layer 0 are not"):
        _prune("llama", sparsity)


def _first_layer(family: str) -> nn.Module:
    return dense_decoder(tiny_model(family)).layers[0]


def test_refit_brings_sparse_layers_nearer_to_the_dense_model() -> None:
    """The final error of the hidden states is lower with the refit than without it."""
    masked = {"pattern": "4:8", "method": {"kind": "sparsegpt", "refit": False}}
    *_, repaired, _ = _prune("llama", {"pattern": "4:8", "method": {"kind": "sparsegpt"}})
    *_, records, _ = _prune("llama", masked)
    assert repaired[-1].error_refit is not None
    final = records[-1].error_refit or records[-1].error_cut
    assert final is not None
    assert repaired[-1].error_refit < final


def test_wanda_alone_needs_no_dense_hidden_states_and_keeps_values() -> None:
    """Without a cut and a refit kept weights have their old values, and no error is measured."""
    dense = tiny_model("llama")
    unmoved: dict[str, Any] = {"pattern": "4:8", "method": {"kind": "wanda"}, "permute": False}
    written, records, _ = _prune("llama", unmoved, (0, 1, 2, 3))
    assert all(record.error_cut is None and record.error_refit is None for record in records)
    for index, tensors in written.items():
        for name, weight in tensors.items():
            before = dense.get_parameter(f"model.layers.{index}.{name}")
            assert torch.equal(weight[weight != 0], before[weight != 0])


def test_in_stages_each_module_still_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wanda reads every input, yet runs attention and MLP no more often than magnitude, which reads none."""
    calls = {"attention": 0, "activation": 0}

    def count(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return forward(*args, **kwargs)

        return counted

    sdpa, activation = nn.functional.scaled_dot_product_attention, type(ACT2FN["silu"])
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count("attention", sdpa))
    monkeypatch.setattr(activation, "forward", count("activation", activation.forward))
    found = []
    for method in ("magnitude", "wanda"):
        calls.update(attention=0, activation=0)
        _prune("llama", {"pattern": "2:8", "method": {"kind": method}}, (0, 1, 2, 3))
        found.append(dict(calls))
    assert found[0] == found[1]
    assert min(found[0].values()) >= 12


def test_skipped_matrices_are_not_changed() -> None:
    """Matrices in ``skip`` or not in ``targets`` keep their weights, except for the refit of the last projection."""
    dense = tiny_model("llama")
    some = {"targets": ["mlp.*"], "skip": ["gate_proj"], "permute": False}
    written, records, _ = _prune("llama", TWO_OF_EIGHT | some, (0, 1, 2, 3))
    assert {matrix.name for record in records for matrix in record.matrices} == {"mlp.up_proj", "mlp.down_proj"}
    for index, tensors in written.items():
        for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight"):
            assert torch.equal(tensors[name], dense.get_parameter(f"model.layers.{index}.{name}"))


@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_end_with_the_pattern(rounds: int) -> None:
    """The share of zeros is the same after one round and after several."""
    written, *_ = _prune("llama", {"pattern": 0.6, "rounds": rounds}, (0, 1, 2, 3))
    weights = [w for tensors in written.values() for name, w in tensors.items() if "proj" in name]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("stop_at", [0, 2])
def test_continued_equals_uninterrupted(stop_at: int, tmp_path: Path) -> None:
    """A continued run is bit-equal to an uninterrupted one, also with hidden states in files."""
    whole, _, logits = _prune("granite", TWO_OF_EIGHT)
    with pytest.raises(_Stopped):
        _prune("granite", TWO_OF_EIGHT, snapshots=Snapshots(tmp_path / "state", "same", share=1e9), stop_at=stop_at)
    store = HiddenStateStore(limit=0, folder=tmp_path)
    rest, records, same = _prune("granite", TWO_OF_EIGHT, snapshots=Snapshots(tmp_path / "state", "same"), store=store)
    assert torch.equal(logits, same)
    assert sorted(rest) == list(range(stop_at, 3))
    assert [record.layer for record in records] == [0, 1, 3]
    for index, tensors in rest.items():
        assert all(torch.equal(tensor, whole[index][name]) for name, tensor in tensors.items())
