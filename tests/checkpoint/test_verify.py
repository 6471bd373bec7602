"""Verification of a checkpoint in a fresh process, with parts of the model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoders import dense_decoder
from transformers import PreTrainedModel

from llmprune.checkpoint.verify import Loading, Probe, SparseClaim, SparseCounts, Verified, verify
from llmprune.common.errors import VerificationError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.testing import VOCABULARY, tiny_model

IDS = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))
ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | {
    f"model.layers.{index}": "disk" for index in range(4)
}


def _saved(folder: Path, family: str, **fields: Any) -> tuple[PreTrainedModel, Path, Probe]:
    """A tiny model with every second weight of a matrix zero, its folder, and its probe."""
    model = tiny_model(family, **fields)
    if family == "llama":
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[:, ::2] = 0
    model.save_pretrained(folder / "model")
    decoder = dense_decoder(model)
    forward = LayerwiseForward(decoder, IDS, batch_size=2)
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            forward.pass_through(index, layer)
    return model, folder / "model", Probe.take(forward)


def _verified(model: PreTrainedModel, folder: Path, probe: Probe, **options: Any) -> Verified:
    return verify(folder, probe, parameters=model.num_parameters(), dtype=torch.float32, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_on_disk_give_the_same_logits(tmp_path: Path, family: str, request: pytest.FixtureRequest) -> None:
    """Layers that stay on disk give the run's logits, zeros and parameters, converted experts and tied heads too."""
    if family != "llama":  # one fresh process is enough
        request.getfixturevalue("in_one_process")
    model, folder, probe = _saved(tmp_path, family, tie_word_embeddings=family == "llama")
    weight = model.model.layers[1].self_attn.o_proj.weight
    zeros = int((weight == 0).sum())
    claim = SparseClaim((("model.layers.1.self_attn.o_proj", False),), weight.numel(), 1, 2, zeros)
    verified = _verified(model, folder, probe, loading=Loading(ON_DISK), claim=claim if family == "llama" else None)
    assert (verified.largest_logit_difference, verified.cached_generation_equal) == (0.0, True)
    if family == "llama":
        assert verified.sparse == SparseCounts(1, weight.numel(), zeros, weight.numel() // 2, 0)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("in_one_process")
def test_other_weights_on_disk_are_refused(tmp_path: Path) -> None:
    """The logits and the pattern are those of the files, not of the run."""
    model, folder, probe = _saved(tmp_path, "llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, :] = 1.0
    model.save_pretrained(folder)
    claim = SparseClaim((("model.layers.1.self_attn.o_proj", False),), 16, 1, 2)
    with pytest.raises(
        VerificationError, match=r"its logits differ .* break the pattern 1:2: model.layers.1"
    ) as raised:
        _verified(model, folder, probe, loading=Loading(ON_DISK), claim=claim)
    assert "parameters" not in str(raised.value)
