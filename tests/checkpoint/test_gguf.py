"""GGUF files by path, of a folder, split, and on the hub give the model that they were made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import write_gguf
from helpers.hub.server import Hub
from transformers import AutoModelForCausalLM

from llmprune.checkpoint.loading import load_config, load_tokenizer
from llmprune.checkpoint.location import conversion_of, folder_of, raw_config
from llmprune.common.errors import LLMPruneError, ModelError
from llmprune.recipe.model import ModelSource
from llmprune.testing import tiny_model

_IDS = torch.arange(18).view(2, 9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with ``one.gguf``, and ``parts`` with the same model in three parts."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama", vocab_size=260, num_hidden_layers=2)
    write_gguf(folder / "one.gguf", model)
    (folder / "parts").mkdir()
    write_gguf(folder / "parts" / "x.gguf", model, tensors_of_part=8)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def _logits(source: ModelSource) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder_of(source, "weights"))(_IDS).logits
    return logits


def test_whole_and_split_files_give_the_model_that_they_were_made_from(files: Path) -> None:
    """Config and tokenizer are there before the weights are converted, and stay the same."""
    wanted = tiny_model("llama", vocab_size=260, num_hidden_layers=2)(_IDS).logits
    sources = [
        ModelSource(id=str(files / "one.gguf")),
        ModelSource(id=str(files / "parts")),
        ModelSource(id=str(files), gguf="parts/x-00002-of-00003.gguf"),
    ]
    for source in sources[:2]:
        conversion, before = conversion_of(source), raw_config(source)
        assert conversion is not None
        assert not conversion.folder.exists()
        assert load_tokenizer(source)("he")["input_ids"] == [258]
        assert torch.equal(_logits(source), wanted)
        assert raw_config(source) == before
        assert before["tie_word_embeddings"] is False
    assert folder_of(sources[2], "weights") == folder_of(sources[1], "weights")


def test_a_file_of_a_repository_is_read(hub: Hub, files: Path) -> None:
    """Of several files the recipe names one, and no other is downloaded."""
    content = (files / "one.gguf").read_bytes()
    hub.add_repo("org/several", {"a-Q8_0.gguf": content, "b.gguf": b"GGUF", "mmproj-a.gguf": b"GGUF"})
    with pytest.raises(ModelError, match=r"has 2 GGUF models; name one in model\.gguf: a-Q8_0\.gguf, b"):
        folder_of(ModelSource(id="org/several"), "config")
    assert load_config(ModelSource(id="org/several", gguf="a-Q8_0.gguf")).num_hidden_layers == 2
    assert len([line for line in hub.lines if line.startswith("GET /cdn/")]) <= 1


def test_files_that_cannot_be_read_are_refused(files: Path, tmp_path: Path) -> None:
    """A part is missing or of another model, a file is cut short or no GGUF, a name is wrong."""
    parts = Path(shutil.copytree(files / "parts", tmp_path / "parts"))
    other = tiny_model("llama", vocab_size=260, num_hidden_layers=3)
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "x.gguf", other, tensors_of_part=12)
    (tmp_path / "cut.gguf").write_bytes((files / "one.gguf").read_bytes()[:5000])
    (tmp_path / "text.gguf").write_text("no model")

    def refusal(**source: str) -> str:
        with pytest.raises(LLMPruneError) as raised:
            folder_of(ModelSource(**source), "weights")
        return str(raised.value)

    assert "is damaged" in refusal(id=str(tmp_path / "cut.gguf"))
    assert "not a GGUF file" in refusal(id=str(tmp_path / "text.gguf"))
    assert "GGUF file" in refusal(id=str(tmp_path / "none.gguf"))
    assert "did you mean 'one.gguf'" in refusal(id=str(files), gguf="on.gguf")
    shutil.copy(tmp_path / "other" / "x-00002-of-00003.gguf", parts)
    assert "no part of the same GGUF file" in refusal(id=str(parts))
    (parts / "x-00002-of-00003.gguf").unlink()
    assert "lacks x-00002-of-00003.gguf, 1 of the 3 parts" in refusal(id=str(parts))
    (parts / "x-00002-of-00003.gguf").symlink_to(files / "parts" / "x-00002-of-00003.gguf")
    assert "leads out of the model's folder" in refusal(id=str(parts))
