"""Models that cannot be pruned: one clear error each, before the expensive work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import command, prune_workspace, write_recipe
from helpers.damaged_models import (
    UP_PROJECTION,
    as_pickle,
    assert_refused,
    broken,
    cut_short,
    with_config,
    with_tensors,
    without_a_shard,
    without_tokenizer,
)
from huggingface_hub import constants

from llmprune.testing import tiny_config

pytestmark = pytest.mark.usefixtures("in_one_process")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_config(model_type="frobnicator"), ["config", "`frobnicator`"]),
        (with_config(hidden_size="32"), ["config", "'hidden_size' expected int, got str"]),
        (with_config(num_attention_heads=5, head_dim=None), ["config", "not a multiple of the number of attention"]),
        (with_config(quantization_config={"quant_method": "vptq"}), ["are quantized", "vptq", "prune the orig"]),
        (with_config(auto_map={"AutoConfig": "a.B"}, model_type="own"), ["own Python code", "trust_remote_code"]),
        pytest.param(with_config(hidden_act="nonsense"), ["'nonsense'"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config", "not a valid JSON"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json", "folder of a Hugging Face checkpoint"]),
        (without_tokenizer, ["has no tokenizer", "beside config.json"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer", "fetch"]),
        (
            lambda folder: tiny_config("bert", is_decoder=False).save_pretrained(folder),
            ["'bert'", "not a causal decoder", "both direct"],
        ),
        (lambda folder: tiny_config("t5").save_pretrained(folder), ["'t5' is not a causal decoder"]),
        (as_pickle, ["no safetensors weights file", "or set model.pickles: true"]),
    ],
    ids=[
        "unknown", "wrong-type", "impossible", "quantized", "own-code", "activation", "no-json", "no-config",
        "no-tokenizer", "broken-tokenizer", "bert", "t5", "pickle",
    ],
)  # fmt: skip
def test_model_that_cannot_be_pruned(
    workspace: Path, tmp_path: Path, spoil: Callable[[Path], object], said: list[str]
) -> None:
    """What config and tokenizer show is refused before weights are read."""
    outcome = prune_workspace(workspace, tmp_path, broken(workspace, tmp_path, spoil))
    assert_refused(outcome, 2, str(said[0]), *said[1:])
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_short, ["weights file", "damaged or cut short", "fetch it again"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), ["weights file", "fetch it again"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["lacks a safetensors weights file"]),
        (without_a_shard, ["model-00002-of-00003.safetensors", "fetch the missing file"]),
        (with_tensors(lambda tensors: tensors.pop(UP_PROJECTION)), ["1 missing", UP_PROJECTION, "complete checkpoint"]),
        (with_tensors(lambda tensors: tensors.update(more=torch.zeros(2))), ["1 unexpected: more"]),
        (
            with_tensors(lambda tensors: tensors.update({UP_PROJECTION: torch.zeros(5, 32)})),
            ["1 mismatched", f"{UP_PROJECTION} ([5, 32], not [96, 32])"],
        ),
        (with_config(tie_word_embeddings=True), ["ties lm_head.weight to model.embed_tokens", "different values for"]),
    ],
    ids=["cut-short", "garbage", "none", "no-shard", "missing", "unexpected", "shape", "tied"],
)
def test_damaged_checkpoint(workspace: Path, tmp_path: Path, spoil: Callable[[Path], object], said: list[str]) -> None:
    """Missing, damaged or strange weights end the run before the passes; nothing is guessed."""
    folder = broken(workspace, tmp_path, spoil)
    outcome = prune_workspace(workspace, tmp_path, folder)
    assert_refused(outcome, 1, str(folder), *said)
    assert not (tmp_path / "out" / "scores.safetensors").exists()
    assert not (tmp_path / "out" / "model").exists()


def test_a_plan_needs_no_weights_but_refuses_damaged_ones(workspace: Path, tmp_path: Path) -> None:
    """``plan`` reads the headers of weights files: one that is cut short is told, and without any it says so."""
    folder = broken(workspace, tmp_path, cut_short)
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, workspace / "text.txt")
    assert_refused(command("plan", recipe), 1, "damaged or cut short")
    (folder / "model.safetensors").unlink()
    outcome = command("plan", recipe)
    assert outcome.code == 0
    assert "no safetensors weights file, which a run needs" in " ".join(outcome.out.split())


@pytest.mark.parametrize("model", ["org/none", "none"])
def test_hub_out_of_reach(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, no_weights: None
) -> None:
    """Offline, a model that is neither a folder nor in the cache is refused at once, with what to check."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert_refused(prune_workspace(workspace, tmp_path, model), 2, f"no folder '{model}'", "HF_HUB_OFFLINE is set")
    assert time.perf_counter() - start < 10  # not half a minute of retries, on a busy machine too
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_in_activations(workspace: Path, tmp_path: Path, value: float) -> None:
    """A weight that makes a layer put out NaN or infinity ends pass 1 and names the layer, not the model's own text."""
    spoil = with_tensors(lambda tensors: tensors[UP_PROJECTION].view(-1)[0].fill_(value))
    text = {"dataset": str(workspace / "text.txt"), "samples": 6, "sequence_length": 32, "self_generated": 2}
    outcome = prune_workspace(workspace, tmp_path, broken(workspace, tmp_path, spoil), calibration=text)
    assert_refused(outcome, 1, "layer 3", "NaN or infinity", "model.dtype")
    assert not (tmp_path / "out" / "model").exists()


def test_not_a_number_behind_the_layers(workspace: Path, tmp_path: Path) -> None:
    """NaN in the head, which no layer shows, is found by the verification."""
    spoil = with_tensors(lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    outcome = prune_workspace(workspace, tmp_path, broken(workspace, tmp_path, spoil))
    assert_refused(outcome, 1, "logits")
    assert not (tmp_path / "out" / "model").exists()
