"""Verification of a checkpoint in a fresh process, with parts of the model on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import verify_here
from helpers.decoders import dense_decoder
from helpers.devices import simulated_devices
from transformers import PreTrainedModel, modeling_utils

from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.result import verify as verify_module
from llmprune.checkpoint.result.verify import Loading, Probe, SparseClaim, SparseCounts, Verified, verify
from llmprune.checkpoint.result.verify_worker import logits_at, same_up_to_rounding
from llmprune.common.errors import VerificationError
from llmprune.layerwise.forward import LayerwiseForward
from llmprune.recipe.model import ModelSource
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


def test_a_full_gpu_verifies_fewer_windows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The saved model is not blamed for memory that another program has taken; at last the CPU verifies."""
    verify_here(monkeypatch)
    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *_: None)  # takes a gigabyte ahead
    model, folder, probe = _saved(tmp_path, "llama")
    on_gpu = Loading({"": 0})
    with simulated_devices(1) as devices:
        all_at_once = _verified(model, folder, probe, loading=on_gpu)
    needed = devices.peak["cuda:0"]
    with simulated_devices(1, memory=needed - 1) as devices:
        assert _verified(model, folder, probe, loading=on_gpu) == all_at_once
    assert devices.peak["cuda:0"] < needed
    weights = 4 * model.num_parameters()
    assert "repeated" not in caplog.text
    with simulated_devices(1, memory=weights + 2**12) as devices:
        assert _verified(model, folder, probe, loading=on_gpu) == all_at_once
    assert devices.peak["cuda:0"] >= weights
    assert "verification: OutOfMemoryError: CUDA out of memory" in caplog.text
    assert "it is repeated on the CPU" in caplog.text


def test_a_gpu_that_takes_no_second_process_leaves_verification_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In exclusive mode the run's own process has it. CUDA's error has several lines, of which the first is said."""
    busy = (
        "Traceback (most recent call last):\n  File x\ntorch.AcceleratorError: CUDA error: all CUDA-capable devices "
        "are busy or unavailable\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
    )
    verify_here(monkeypatch)
    here, seen = verify_module.subprocess.run, []

    def run(arguments: list[str], **options: Any) -> Any:
        seen.append((json.loads(Path(arguments[3]).read_text())["device_map"], options["env"]["CUDA_VISIBLE_DEVICES"]))
        return SimpleNamespace(returncode=1, stdout="", stderr=busy) if len(seen) == 1 else here(arguments, **options)

    monkeypatch.setattr(verify_module, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    model, folder, probe = _saved(tmp_path, "llama")
    verified = _verified(model, folder, probe, loading=Loading({"": 0}, on_cpu=ON_DISK))
    assert verified.largest_logit_difference == 0.0
    assert seen == [({"": 0}, "3"), (ON_DISK, "")]
    assert "CUDA error: all CUDA-capable devices are busy or unavailable; it is repeated on the CPU" in caplog.text


def test_heads_on_the_last_of_several_gpus_give_logits(tmp_path: Path) -> None:
    """Positions are read where the hidden states are, which is not where the tokens are."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    positions_P = torch.tensor([0, 5, 23])
    expected = logits_at(model, IDS, positions_P=positions_P, inputs={})
    devices = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1} | {
        f"model.layers.{index}": index // 2 for index in range(4)
    }
    with simulated_devices(2), torch.inference_mode():
        spread = load_model(ModelSource(id=str(tmp_path), device_map=devices))
        found = logits_at(spread, IDS.to("cuda:0"), positions_P=positions_P, inputs={})
    assert torch.equal(found, expected)


def test_rounding_may_decide_between_equally_likely_tokens() -> None:
    """With and without a cache a model may choose either of two such tokens, but no other."""
    model = tiny_model("llama")
    ids = IDS[:1].tolist()[0]
    with torch.no_grad():
        best = int(model(input_ids=IDS[:1]).logits[0, -1].argmax())
        worst = int(model(input_ids=IDS[:1]).logits[0, -1].argmin())
        model.lm_head.weight[worst + 1 - 2 * (worst == VOCABULARY - 1)] = model.lm_head.weight[best]
    twin = worst + 1 - 2 * (worst == VOCABULARY - 1)

    def same(one: int, other: int) -> bool:
        return same_up_to_rounding(model, [[[*ids, one, 7]], [[*ids, other, 9]]], tolerance=1e-4)

    with torch.no_grad():
        assert same(best, best) is False  # the tokens after it
        assert same(best, twin) is True
        assert same(best, worst) is False
