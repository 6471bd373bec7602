"""Pickled weights are read where the recipe asks for it, by a loader that runs none of their code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub.server import Hub
from safetensors.torch import load_file

from llmprune.checkpoint.language_model_check import require_language_model
from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.location import folder_of, headers_of, reads_pickles
from llmprune.checkpoint.open_decoder import open_reader
from llmprune.common.errors import CheckpointError, ModelError
from llmprune.recipe.model import ModelSource
from llmprune.testing import tiny_model

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A tiny Llama in two pickled shards with an index; two tensors share memory, as tied ones do."""
    folder = tmp_path / "base"
    tiny_model("llama", tie_word_embeddings=True).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + (name in names[20:])}-of-00002.bin" for name in names}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _source(folder: Path | str, **options: Any) -> ModelSource:
    return ModelSource(id=str(folder), **{"pickles": True} | options)


def test_pickled_weights_are_converted_once(pickled: Path) -> None:
    """The values and the other files stay; a plan before has no headers, and later runs find the same folder."""
    expected = load_model(_source(pickled))
    made = folder_of(_source(pickled), "weights")
    assert made != pickled
    assert folder_of(_source(pickled), "config") == pickled
    assert (made / "config.json").read_bytes() == (pickled / "config.json").read_bytes()
    stored = {name: one for path in made.glob("*.safetensors") for name, one in load_file(path).items()}
    assert all(torch.equal(stored[name], one) for name, one in expected.state_dict().items())
    states = [path.stat().st_mtime_ns for path in made.iterdir()]
    assert open_reader(_source(pickled)).folder == made
    assert states == [path.stat().st_mtime_ns for path in made.iterdir()]
    assert headers_of(_source(pickled))
    (pickled / "notes.txt").touch()
    assert headers_of(_source(pickled)) is None


def test_pickled_weights_are_refused_without_being_asked_for(pickled: Path) -> None:
    """The refusal names the key of the recipe."""
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin.*set model\.pickles: true"):
        require_language_model(_source(pickled, pickles=False), {})
    require_language_model(_source(pickled), {})


class _Harmful:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("run",))


def test_an_object_that_is_no_tensor_is_not_made(pickled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code does not run; a mapping of anything else, a damaged and a missing file are named too."""
    path = pickled / "pytorch_model-00001-of-00002.bin"
    whole = path.read_bytes()
    torch.save({"x": _Harmful()}, path)
    with pytest.raises(ModelError, match=r"holds other objects than tensors.*convert it to safetensors where you"):
        folder_of(_source(pickled), "weights")
    assert "run" not in capsys.readouterr().out
    torch.save({"model": {"x": torch.ones(1)}}, path)
    with pytest.raises(ModelError, match="is no mapping from names to tensors"):
        folder_of(_source(pickled), "weights")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cannot be read.*fetch it again"):
        folder_of(_source(pickled), "weights")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {path.name}"):
        folder_of(_source(pickled), "weights")
    assert not list((pickled.parent / "home").glob("llmprune/*"))


def test_pickled_weights_of_the_hub_are_fetched_only_if_asked_for(hub: Hub, pickled: Path) -> None:
    """A repository without safetensors; one with them is read from these."""
    hub.add_repo("org/base", {path.name: path.read_bytes() for path in pickled.iterdir()})
    folder_of(_source("org/base", pickles=False), "weights")
    assert not [line for line in hub.lines if ".bin" in line and "index" not in line]
    assert reads_pickles(_source("org/base"))
    assert headers_of(_source("org/base")) is None
    model = load_model(_source("org/base"))
    assert torch.equal(model.lm_head.weight, load_model(_source(pickled)).lm_head.weight)
    tiny_model("llama").save_pretrained(pickled)
    assert not reads_pickles(_source(pickled))
