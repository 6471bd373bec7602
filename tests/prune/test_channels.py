"""Residual channels cut out of a whole model: sizes, order, repair, and continuation after a stop."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.decoders import dense_decoder
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.anatomy.discovery import discover
from llmprune.anatomy.hidden_size import find_hidden_size
from llmprune.anatomy.layer_equivalence import sizes_of_hidden
from llmprune.anatomy.meta_model import find_layers
from llmprune.anatomy.types import Anatomy
from llmprune.checkpoint.skeleton import tensors_of
from llmprune.cut.apply import cut_decoder, narrow_decoder
from llmprune.cut.decision import Cut
from llmprune.layerwise.decoder import Tensors
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.prune.pass2 import Pruning
from llmprune.prune.snapshots import Snapshots
from llmprune.recipe.refit import Refit
from llmprune.testing import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0))
KEEP = torch.arange(32)[torch.arange(32) % 4 != 1]  # 24 channels
FAMILIES = ["llama", "gemma3_text", "mixtral"]  # plain; tied, norms with an offset and after writers; experts


@cache
def _model(family: str) -> tuple[PreTrainedModel, Anatomy]:
    model = tiny_model(family)
    anatomy = discover(model.config)
    return model, replace(anatomy, hidden=find_hidden_size(model.config, anatomy))


class _Stopped(Exception):
    pass


def _prune(
    family: str,
    refit: Refit | None,
    *,
    layers: tuple[int, ...] = (0, 1, 2, 3),
    snapshots: Snapshots | None = None,
    stop_at: int | None = None,
) -> tuple[dict[int, Tensors], LayerwiseForward]:
    """The layers that this run wrote, and the narrow model after its last layer."""
    model, anatomy = _model(family)
    dense, cut = dense_decoder(model), Cut(4, layers, hidden=KEEP)
    wide = cut_decoder(dense, anatomy=anatomy, cut=cut.with_all_channels)
    narrow = narrow_decoder(wide, anatomy=anatomy, cut=cut)
    written: dict[int, Tensors] = {}

    def write(index: int, tensors: Tensors) -> None:
        if index == stop_at:
            raise _Stopped
        written[index] = {name: tensor.clone() for name, tensor in tensors.items()}

    pruning = Pruning(dense, wide, anatomy=anatomy, cut=cut, refit=refit, write=write, narrow=narrow)
    _, forward = pruning.run(WINDOWS, 6, snapshots=snapshots)
    return written, forward


def _divergence(family: str, forward: LayerwiseForward) -> float:
    dense_BLV = _model(family)[0](WINDOWS[:6]).logits.log_softmax(-1)
    pruned_BLV = forward.logits(0).log_softmax(-1)
    return float((dense_BLV.exp() * (dense_BLV - pruned_BLV)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_repair_retains_more_than_the_cut_alone(family: str) -> None:
    """The written layers and the skeleton are the narrow model, whose own forward gives the same logits."""
    layers = (0, 1, 3) if family == "llama" else (0, 1, 2, 3)
    _, cut_only = _prune(family, None, layers=layers)
    written, repaired = _prune(family, Refit(), layers=layers)
    assert repaired.hidden_states[0].shape[-1] == len(KEEP)
    assert _divergence(family, repaired) < 0.8 * _divergence(family, cut_only)
    assert torch.allclose(_own_logits(repaired, written), repaired.logits(0), atol=1e-4)


def _own_logits(forward: LayerwiseForward, written: dict[int, Tensors]) -> Tensor:
    skeleton = forward.decoder.skeleton
    path, layers = find_layers(skeleton)
    model = type(skeleton)(skeleton.config).eval()
    rest = tensors_of(skeleton, skip=path)
    inside = {f"{path}.{index}.{name}": one for index, own in written.items() for name, one in own.items()}
    model.load_state_dict(rest | inside, strict=True)
    assert len(layers) == len(written)
    with torch.no_grad():
        logits: Tensor = model(WINDOWS[:6]).logits
    return logits


def test_all_channels_in_another_order_change_nothing() -> None:
    """A cut that keeps every channel, whatever their order, is the dense model without a refit."""
    model, anatomy = _model("llama")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    decoder = cut_decoder(dense_decoder(model), anatomy=anatomy, cut=Cut(4, (0, 1, 2, 3), hidden=order))
    forward = LayerwiseForward(decoder, WINDOWS[:2], batch_size=2)
    for index in range(4):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    with torch.no_grad():
        assert torch.allclose(forward.logits(0), model(WINDOWS[:2]).logits, atol=1e-4)


def test_continued_equals_uninterrupted(tmp_path: Path) -> None:
    """Snapshots hold the narrow hidden states too."""
    whole, whole_forward = _prune("llama", Refit())
    streams = ("dense", "pruned", "narrow")
    with pytest.raises(_Stopped):
        _prune("llama", Refit(), snapshots=Snapshots(tmp_path, "same", share=1e9, streams=streams), stop_at=2)
    rest, forward = _prune("llama", Refit(), snapshots=Snapshots(tmp_path, "same", share=1e9, streams=streams))
    assert sorted(rest) == [2, 3]
    assert all(torch.equal(value, whole[index][name]) for index, own in rest.items() for name, value in own.items())
    assert torch.equal(forward.logits(0), whole_forward.logits(0))


def test_unused_sizes_follow_the_hidden_size() -> None:
    """Falcon-H1's layers record a multiple of the hidden size; smaller numbers, such as positions, may not change."""
    model, anatomy = _model("falcon_h1")
    assert anatomy.hidden is not None
    assert anatomy.hidden.refusal is None
    narrow = cut_decoder(dense_decoder(model), anatomy=anatomy, cut=Cut(4, (0, 1, 2, 3), hidden=KEEP))
    assert narrow.skeleton.config.hidden_size == len(KEEP)
    sizes = sizes_of_hidden(32, 24)
    assert {(32, 24), (48, 36)} <= sizes
    assert (8, 6) not in sizes
