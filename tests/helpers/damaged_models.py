"""Damaged copies of a tiny model, and the check of the message that a command refuses them with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.commands import Outcome
from llmprune.testing import tiny_model

UP_PROJECTION = "model.layers.3.mlp.up_proj.weight"


def assert_refused(outcome: Outcome, code: int, *said: str) -> None:
    """The command ended with this code and one message that says all this."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count("llmprune: ") == 1
    assert "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.err


def broken(workspace: Path, tmp_path: Path, spoil: Callable[[Path], object]) -> Path:
    """A copy of the model, spoilt."""
    folder = tmp_path / "broken"
    shutil.copytree(workspace / "base", folder)
    spoil(folder)
    return folder


def with_config(**changes: Any) -> Callable[[Path], object]:
    """Spoil ``config.json``."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Spoil the weights."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def cut_short(folder: Path) -> None:
    """Half a weights file."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_pickle(folder: Path) -> None:
    """The weights as an old checkpoint has them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_shard(folder: Path) -> None:
    """Several shards, one of them gone."""
    (folder / "model.safetensors").unlink()
    tiny_model("llama", vocab_size=260, num_hidden_layers=4).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model-00002-of-00003.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    """The model alone."""
    for path in folder.glob("*token*"):
        path.unlink()
