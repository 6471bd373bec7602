"""Peers of the quality benchmark: each removes what it was asked to, and its repair does what its paper says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.testing import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from peer_methods.base import Peer

BENCHMARKS = Path(__file__).parents[1] / "eval" / "benchmarks"
FAMILIES = ("llama", "gemma3_text")  # without and with norms behind attention and MLP
NAMES = sorted(
    path.stem for path in (BENCHMARKS / "peer_methods").glob("*.py") if "(Peer):" in path.read_text(encoding="utf-8")
)
NOT_PLAIN = {
    ("linear_patch", "llama"),
    ("linear_patch", "gemma3_text"),
    ("replaceme", "gemma3_text"),
    ("flap", "gemma3_text"),
}
WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmarks' modules importable."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model."""
    return tiny_model(request.param).eval()


def _peer(name: str) -> type[Peer]:
    """Return the registered peer of a file."""
    from peer_methods import PEERS

    return next(peer for peer in PEERS.values() if peer.__module__ == f"peer_methods.{name}")


def _pruned(dense: PreTrainedModel, name: str, amount: int) -> tuple[PreTrainedModel, list[int]]:
    """Return the model after a peer, and the layers that it removed."""
    from peer_methods.base import observe

    peer, model = _peer(name)([amount]), copy.deepcopy(dense)
    observe(model, [peer], WINDOWS)
    return model, peer.prune(model, amount, WINDOWS)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=WINDOWS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_each_peer_removes_what_was_asked(dense: PreTrainedModel, name: str, tmp_path: Path) -> None:
    """Layers or neurons are gone, the model computes, and plain transformers loads it where the method allows that."""
    from peers import loads_plain

    if name == "optipfair_own":
        pytest.importorskip("optipfair")
    layers, width = dense.config.num_hidden_layers, dense.config.intermediate_size
    removes = _peer(name).removes
    amount = 2 if removes == "layers" else width // 4
    model, removed = _pruned(dense, name, amount)
    assert len(set(removed)) == (amount if removes == "layers" else 0)
    assert len(model.model.layers) == model.config.num_hidden_layers == layers - len(removed)
    left = width - (amount if removes == "neurons" else 0)
    assert model.config.intermediate_size == left
    assert {layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers} == {left}
    assert _logits(model).isfinite().all()
    plain = (name, dense.config.model_type) not in NOT_PLAIN
    assert loads_plain(model, tmp_path) == plain
    if plain:
        assert torch.allclose(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model), atol=1e-5)


def test_scaled_layers_cancel_a_scaled_embedding(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream may have any scale, with norms behind the projections or without: logits stay (but for epsilon)."""
    from peer_methods.surgery import scale_written

    model = copy.deepcopy(dense)
    model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: 64 * output)
    for layer in model.model.layers:
        scale_written(layer, 64)
    for one in (model, dense):
        for norm in (module for module in one.modules() if isinstance(module, type(one.model.norm))):
            monkeypatch.setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.0)
    assert torch.allclose(_logits(model), _logits(dense), atol=1e-5)


def test_a_linear_map_brings_the_stream_nearer(dense: PreTrainedModel) -> None:
    """Behind the replaced block, hidden states on the calibration text are nearer to the dense ones than without it."""
    from peer_methods.base import trace
    from peer_methods.surgery import remove_layers

    mapped, removed = _pruned(dense, "replaceme", 1)
    bare = copy.deepcopy(dense)
    remove_layers(bare, removed)
    with torch.no_grad():
        wanted = trace(dense, WINDOWS).hidden_BLD[removed[0] + 1]
        errors = [(trace(model, WINDOWS).hidden_BLD[removed[0]] - wanted).norm() for model in (mapped, bare)]
    assert errors[0] < 0.95 * errors[1]


def test_a_bias_keeps_the_mean_of_what_an_mlp_writes(dense: PreTrainedModel) -> None:
    """The first down projection's mean output over the calibration text is as before."""
    model, _ = _pruned(dense, "flap", dense.config.intermediate_size // 2)
    means = []
    for one in (dense, model):
        outputs: list[torch.Tensor] = []
        with one.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda _module, _inputs, output, seen=outputs: seen.append(output)
        ):
            _logits(one)
        means.append(outputs[0].mean((0, 1)))
    assert torch.allclose(*means, atol=1e-6)


def test_neurons_that_others_can_replace_go_first() -> None:
    """Of neurons that repeat others, one of each pair goes, and its weight moves to the other."""
    from peer_methods.osscar import reconstruct

    generator = torch.Generator().manual_seed(0)
    inputs_TF = torch.randn(200, 8, generator=generator).repeat(1, 2)
    weight_DF = torch.randn(5, 16, generator=generator)
    kept_K, weight_DK = reconstruct(weight_DF, inputs_TF.T @ inputs_TF, 8)
    assert sorted(kept_K.remainder(8).tolist()) == list(range(8))
    wanted_TD = inputs_TF @ weight_DF.T
    assert (inputs_TF[:, kept_K] @ weight_DK.T - wanted_TD).norm() < 0.05 * wanted_TD.norm()


@pytest.mark.parametrize("size", [1, 2, 32, 12, 20, 576])
def test_hadamard_matrices_are_orthonormal(size: int) -> None:
    """Powers of two, and those times a prime of Paley's kind plus one."""
    from peer_methods.linear_patch import hadamard

    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert torch.allclose(matrix.abs(), torch.tensor(size**-0.5))
