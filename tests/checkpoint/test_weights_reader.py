"""Layers that come from the files: read when they are visited, and refused where a file changes in between."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune.checkpoint.open_decoder import open_decoder, open_reader
from llmprune.common.errors import CheckpointError
from llmprune.recipe.model import ModelSource
from llmprune.testing import tiny_model

NORM = "model.norm.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama in several shards on disk."""
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


@pytest.mark.parametrize("change", [_cut_short, Path.unlink])
def test_a_file_that_changes_after_it_was_opened_is_refused(change: Callable[[Path], None], llama: Path) -> None:
    """Reading past the end of a mapped file would kill the process: the next layer is not read, with a sentence."""
    decoder = open_decoder(ModelSource(id=str(llama)))
    decoder.tensors(0)
    path = sorted(llama.glob("*.safetensors"))[0]
    change(path)
    decoder.drop_held()
    with pytest.raises(CheckpointError, match=rf"changed while it was used: {path.name}.*fetch it again"):
        [decoder.tensors(index) for index in range(4)]


def test_a_file_that_changes_before_it_is_opened_is_refused(llama: Path) -> None:
    """A shard that is damaged after the plan is named where its first tensor is needed."""
    reader = open_reader(ModelSource(id=str(llama)))
    path = llama / reader.names.headers[NORM].file
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(CheckpointError, match=rf"{path.name}.*cut short.*fetch it again"):
        reader.read([NORM])


def test_tensors_in_the_type_of_the_computation_are_views_of_the_file(llama: Path) -> None:
    """Reading one again gives the same memory; another type takes memory of its own."""
    source = ModelSource(id=str(llama))
    reader = open_reader(source)
    dtypes = reader.names.compute_dtypes(torch.float32)
    first, again = (reader.read([NORM], dtypes=dtypes)[NORM] for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    halved = open_decoder(source.model_copy(update={"dtype": "float16"})).tensors(0)
    assert {tensor.dtype for tensor in halved.values()} == {torch.float16}


def test_buffers_that_no_file_has_are_the_models_own(tmp_path: Path) -> None:
    """GPT-Neo's older files hold no attention bias; a layer has it all the same."""
    tiny_model("gpt_neo").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith("attn.attention.bias")}
    save_file(tensors, path, {"format": "pt"})
    decoder = open_decoder(ModelSource(id=str(tmp_path)))
    with decoder.layer(0) as layer:
        assert not any(value.is_meta for value in (*layer.parameters(), *layer.buffers()))
