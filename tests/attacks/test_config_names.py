"""Names in config and tokenizer files: no field of them opens a file outside the model's folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hub.published import files_of
from helpers.hub.server import Hub
from helpers.named_files import WEIGHTS, edit, index
from huggingface_hub import constants

from llmprune.checkpoint.file_references import INDEX
from llmprune.checkpoint.loading import load_config, load_model, load_tokenizer
from llmprune.common.errors import LLMPruneError, ModelError
from llmprune.recipe.model import ModelSource


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation in the config.json"),
        ("config.json", {"text_config": {"_attn_implementation": "paged|a/b:c"}}, "_attn_implementation in"),
        ("config.json", {"attn_implementation": {"text_config": "a/b"}}, "attn_implementation in"),
        ("config.json", {"transformers_weights": "../x.safetensors"}, "transformers_weights in"),
        ("config.json", {"backbone": "someone/backbone"}, "backbone in"),
        ("config.json", {"vision_config": {"architecture": "hf-hub:someone/model"}}, "architecture in"),
        ("config.4.0.0.json", {"transformers_weights": "/x.safetensors"}, "transformers_weights in the config.4.0.0"),
        ("config.json", {"tokenizer_class": "AutoProcessor"}, "tokenizer_class in"),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaForCausalLM"}, "tokenizer_class in"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["/private/tokenizer.4.0.json"]}, "fast_tokenizer_files"),
        ("tokenizer_config.json", {"vocab": "/private/vocab.json"}, "vocab in the tokenizer_config.json"),
        ("tokenizer_config.json", {"init_inputs": ["/private/vocab.json"]}, "init_inputs in"),
        ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "/private/x.model"}}, "model_file in"),
        ("tokenizer_config.json", {"mecab_kwargs": {"mecab_option": "-d /private"}}, "mecab_option in"),
        ("tokenizer_config.json", {"chat_template": [{"name": "../../x", "template": ""}]}, "chat_template in"),
        ("tokenizer_config.json", {"chat_template": {"default": "", "/x": ""}}, "chat_template in"),
        ("special_tokens_map.json", {"tokenizer_file": "/private/tokenizer.json"}, "tokenizer_file in the special_tok"),
        ("special_tokens_map.json", {"source_spm": "/private/x.spm"}, "source_spm in the special_tokens_map.json"),
        ("special_tokens_map.json", {"vocab": 5}, "vocab in the special_tokens_map.json"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["d/tokenizer.4.0.json"]}, "fast_tokenizer_files"),
        (
            "byte_maps.json",
            {"decompose_map": "/private/x.json", "merge_map": {}},
            "decompose_map in the byte_maps",
        ),
        ("byte_maps.json", {"decompose_map": {}, "merge_map": "/private/x.json"}, "merge_map in the byte_maps.json"),
        ("tokenizer.4.0.0.json", {"model": {"vocab": "/private/x"}}, "vocab in the tokenizer.4.0.0.json"),
        ("tokenizer.json", {"model": {"vocab": {}, "merges": "/private/x"}}, "merges in the tokenizer.json"),
        ("special_tokens_map.json", {"name_or_path": "someone/model"}, "name_or_path in the special_tokens_map.json"),
        ("adapter_config.json", {"base_model_name_or_path": "/private"}, "holds an adapter .* beside"),
    ],
)
def test_no_field_names_another_file_or_repository(model: Path, name: str, fields: dict[str, Any], said: str) -> None:
    """Each field that transformers would follow is refused by its name, before transformers reads it."""
    edit(model / name, lambda data: data.update(fields))
    with pytest.raises(ModelError, match=said):
        load_tokenizer(ModelSource(id=str(model)))


def test_files_that_an_older_version_named_are_not_opened(model: Path, tmp_path: Path) -> None:
    """Paths that old tokenizers carry with them are common: the folder's own files count, and nothing else is read."""
    private = tmp_path / "private.json"
    private.write_text("no tokenizer")
    names = ("tokenizer_file", "vocab_file", "merges_file", "spm_file", "gguf_file", "source_spm", "target_spm")
    before = load_tokenizer(ModelSource(id=str(model)))("text")
    edit(model / "tokenizer_config.json", lambda data: data.update(dict.fromkeys(names, str(private))))
    tokenizer = load_tokenizer(ModelSource(id=str(model)))
    assert tokenizer("text") == before
    assert str(private) not in json.dumps(tokenizer.init_kwargs, default=str)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert str(private) not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_a_private_tokenizer_is_not_read_by_a_map_of_special_tokens(model: Path, tmp_path: Path) -> None:
    """transformers takes every key of that map for an argument: the private vocabulary would be in the result."""
    edit(model / "special_tokens_map.json", lambda data: data.update(tokenizer_file=str(tmp_path / "private.json")))
    shutil.move(model / "tokenizer.json", tmp_path / "private.json")
    with pytest.raises(
        ModelError, match=r"tokenizer_file in the special_tokens_map\.json of .* outside the model's own"
    ):
        load_tokenizer(ModelSource(id=str(model)))


@pytest.mark.parametrize("exists", [True, False])
def test_a_private_vocabulary_is_not_read_by_a_tokenizer(model: Path, tmp_path: Path, exists: bool) -> None:
    """A tokenizer's class opens a text in place of the vocabulary, and would tell whether there is such a file."""
    private = tmp_path / "private.txt"
    if exists:
        private.write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\nsecret\n")
    words = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    described = words | {"max_input_chars_per_word": 9, "vocab": str(private)}
    steps = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    edit(model / "tokenizer.json", lambda data: data.update(steps, added_tokens=[], model=described))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ModelError, match=r"vocab in the tokenizer\.json of .* which names something outside"):
        load_tokenizer(ModelSource(id=str(model)))


@pytest.mark.parametrize("name", ["LlamaTokenizer ", "Tekken", "AutoProcessor"])
def test_the_weights_need_no_tokenizers_class(model: Path, name: str) -> None:
    """A word that is no tokenizer's class is called that, and only where the tokenizer is asked for."""
    for file in ("tokenizer_config.json", "config.json"):
        edit(model / file, lambda data: data.update(tokenizer_class=name))
        load_model(ModelSource(id=str(model)))
        with pytest.raises(
            ModelError, match=rf"tokenizer_class in the {file} of .*'{name}', and only tokenizer classes"
        ):
            load_tokenizer(ModelSource(id=str(model)))
        edit(model / file, lambda data: data.pop("tokenizer_class"))


def test_trusted_code_is_the_repositorys_own(model: Path) -> None:
    """Whoever trusts a repository's code did not trust the repository that it names."""
    edit(model / "config.json", lambda data: data.update(auto_map={"AutoConfig": "someone/else--code.Config"}))
    with pytest.raises(ModelError, match=r"auto_map in the config\.json"):
        load_config(ModelSource(id=str(model), trust_remote_code=True))
    load_config(ModelSource(id=str(model)))  # no code is run, so nothing is fetched


@pytest.mark.parametrize("file", ["../x.gguf", "sub/../../x.gguf", "{private}/x.gguf"])
def test_a_packaged_model_lies_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """``package://`` leads nowhere else, by dots or by an absolute path."""
    (tmp_path / "somepackage" / "sub").mkdir(parents=True)
    (tmp_path / "somepackage" / "__init__.py").touch()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="has no GGUF file"):
        load_config(ModelSource(id=f"package://somepackage/{file.format(private=tmp_path)}"))
    assert "somepackage" not in sys.modules


def test_a_cache_from_the_hub_loads_as_before(model: Path, hub: Hub) -> None:
    """An honest repository with an index: its shards and nothing else."""
    files = files_of(model)
    files[INDEX] = index("part.safetensors", model)
    files["part.safetensors"] = files.pop(WEIGHTS)
    hub.add_repo("org/honest", files)
    loaded, local = load_model(ModelSource(id="org/honest")), load_model(ModelSource(id=str(model)))
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    assert Path(loaded.config.name_or_path).is_relative_to(constants.HF_HUB_CACHE)


def test_errors_are_for_people(model: Path) -> None:
    """A name with escape sequences is printed without them."""
    (model / INDEX).write_bytes(index("/x\x1b[2J\u202e.safetensors", model))
    with pytest.raises(LLMPruneError) as caught:
        load_model(ModelSource(id=str(model)))
    assert str(caught.value).isprintable()
