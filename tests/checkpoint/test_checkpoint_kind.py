"""The plan refuses checkpoints that are no plain language models, with the reason and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import save_model
from helpers.hub.server import Hub
from helpers.tiny import structure_of
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from llmprune.anatomy.meta_model import build_meta_model
from llmprune.checkpoint.loading import load_tokenizer
from llmprune.common.errors import ModelError
from llmprune.planning.plan import plan_and_check
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.testing import tiny_config

# Files in addition to a tiny llama's config.json, fields of that file, and parts of the refusal.
KINDS: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "embedding": (
        ["modules.json"],
        {"architectures": ["LlamaModel"]},
        ["embedding model", "modules.json", "prune the"],
    ),
    "embedding-of-a-language-model": (["1_Pooling/config.json"], {}, ["embedding model (1_Pooling/config.json)"]),
    "no-head": ([], {"architectures": ["LlamaModel"]}, ["no head at all", "LlamaModel"]),
    "classifier": ([], {"architectures": ["LlamaForSequenceClassification"]}, ["classifier's or reward", "prune the"]),
    "reward": ([], {"architectures": ["LlamaForRewardModel"]}, ["a custom head", "LlamaForRewardModel"]),
    "tagger": ([], {"architectures": ["LlamaForTokenClassification"]}, ["token classifier's head"]),
    "modelopt": (["hf_quant_config.json"], {}, ["quantized (hf_quant_config.json)", "prune the original"]),
    "gptq": (["quantize_config.json"], {}, ["quantized (quantize_config.json)"]),
    "nested": (
        [],
        {"text_config": {"quantization_config": {"quant_method": "aqlm"}}},
        ["quantized by the method aqlm", "methods that can: awq, "],
    ),
    "pickle": (
        ["pytorch_model-00001-of-00002.bin"],
        {},
        ["no safetensors", "pytorch_model-0", "model.pickles: true"],
    ),
    "adapter": (["adapter_config.json", "model.safetensors"], {}, ["holds an adapter", "beside weights of its own"]),
    "sentencepiece": (["tokenizer.model"], {}, ["tokenizer.model", "pip install sentencepiece", "tokenizer.json"]),
}
# Files of a folder without a config.json, and parts of the refusal.
WITHOUT_CONFIG = {
    "bare-adapter": (["adapter_config.json", "adapter_model.safetensors"], ["is an adapter of kind None"]),
    "run": (["recipe.yaml", "model/config.json"], ["is the folder of a run", "give {shown}/model"]),
    "inner": (["0_Transformer/config.json", "x.txt"], ["give {shown}/0_Transformer"]),
    "gguf": (["x.gguf", "y.gguf"], ["has 2 GGUF models; name one in model.gguf: x.gguf, y.gguf"]),
    "inner gguf": (["Q8/x.gguf"], ["no GGUF file at its top", "model.gguf"]),
    "images": (["model_index.json", "unet/config.json"], ["is a pipeline of diffusers"]),
    "nothing": ([], ["has no config.json; give the folder"]),
}


def _sentencepiece() -> bytes:
    """Return the start of a SentencePiece file: a message with its first piece."""
    return b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


def _config(**fields: Any) -> dict[str, Any]:
    return {**json.loads(tiny_config("llama", vocab_size=260).to_json_string()), **fields}


def _files(names: list[str], fields: dict[str, Any] | None) -> dict[str, bytes]:
    contents = {name: _sentencepiece() if name == "tokenizer.model" else b"{}" for name in names}
    return contents | ({} if fields is None else {"config.json": json.dumps(_config(**fields)).encode()})


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _refusal(model: Path | str) -> str:
    """Return a plan's problems with the model, without those with the text."""
    found = plan_and_check(_recipe(model))
    return "\n".join(problem for problem in found.errors.listed() if problem.startswith("model: "))


def _recipe(model: Path | str) -> Recipe:
    return Recipe.parse(f"model: {{id: '{model}'}}\ncalibration: {{dataset: text.txt}}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_no_plain_language_model_is_refused_by_its_plan(kind: str, tmp_path: Path) -> None:
    """File names and config are enough: there are no weights at all."""
    names, fields, message = KINDS[kind]
    refusal = _refusal(_write(tmp_path, _files(names, fields)))
    assert all(part in refusal for part in message), refusal


@pytest.mark.parametrize("kind", KINDS)
def test_a_repository_that_is_no_plain_language_model_is_refused_by_its_plan(hub: Hub, kind: str) -> None:
    """The list of files is enough: no weights are downloaded."""
    names, fields, message = KINDS[kind]
    hub.add_repo("org/base", _files(names, fields))
    refusal = _refusal("org/base")
    assert all(part in refusal for part in message), refusal
    assert not any(line.startswith("GET /cdn/") for line in hub.lines)


@pytest.mark.parametrize("kind", WITHOUT_CONFIG)
def test_a_folder_without_a_config_is_described_by_its_files(kind: str, tmp_path: Path) -> None:
    """An adapter, a run's folder, a checkpoint in a subfolder and a GGUF file are recognised."""
    names, message = WITHOUT_CONFIG[kind]
    refusal = _refusal(_write(tmp_path, _files(names, None)))
    assert all(part.format(shown=tmp_path) in refusal for part in message), refusal


def test_a_repository_with_only_an_adapter_is_recognised(hub: Hub) -> None:
    """The repository has no config.json."""
    hub.add_repo("org/adapter", _files(["adapter_config.json", "adapter_model.safetensors"], None))
    assert "org/adapter is an adapter" in _refusal("org/adapter")


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("t5", "an encoder-decoder for text"),
        ("whisper", "a speech or audio model with an encoder"),
        ("wav2vec2", "a speech or audio model"),
        ("vits", "a speech or audio generator"),
        ("clip", "an encoder of images and texts"),
        ("vit", "a vision model"),
        ("sam", "a vision model"),
        ("modernbert", "a text encoder"),
        ("timesfm", "a model of time series"),
    ],
)
def test_a_model_that_is_no_decoder_is_named_as_what_it_is(family: str, said: str) -> None:
    """Its auto classes tell."""
    with pytest.raises(ModelError, match=f"'{family}' is not a causal decoder but {said}"):
        build_meta_model(CONFIG_MAPPING[family]())


def test_weights_in_eight_bits_are_recognised_by_their_headers(tmp_path: Path) -> None:
    """A checkpoint is refused as quantized for the types of its tensors alone."""
    _write(tmp_path, _files([], {}))
    save_file({"model.norm.weight": torch.zeros(32).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert "quantized (tensors in F8_E4M3)" in _refusal(tmp_path)


def test_a_missing_head_is_reported_by_the_plan(tmp_path: Path) -> None:
    """The headers show that the files have no tensor for it."""
    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensors[name] for name in tensors.keys() - {"lm_head.weight"}}, tmp_path / "model.safetensors")
    assert "do not fit its config (1 missing: lm_head.weight); get a complete checkpoint" in _refusal(tmp_path)


def test_tensors_that_do_not_fit_are_reported_by_the_plan(tmp_path: Path) -> None:
    """Names and shapes in the headers are compared with the model's; buffers of older versions are ignored."""
    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | old, tmp_path / "model.safetensors")
    structure_of(_recipe(tmp_path))
    tensors |= {"lm_head.weight": torch.ones(50, 32), "model.extra.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    refusal = _refusal(tmp_path)
    assert "1 unexpected: model.extra.weight" in refusal
    assert "1 mismatched: lm_head.weight ([50, 32], not [260, 32])" in refusal


def test_all_reasons_are_given_at_once(tmp_path: Path) -> None:
    """A quantized classifier is refused for both reasons."""
    fields = KINDS["classifier"][1]
    refusal = _refusal(_write(tmp_path, _files(["hf_quant_config.json"], fields)))
    assert "classifier" in refusal
    assert "quantized" in refusal


def test_a_damaged_weights_file_is_reported_by_the_plan(tmp_path: Path) -> None:
    """A header that cannot be read is an error."""
    _write(tmp_path, _files([], {}) | {"model.safetensors": b"\0" * 12})
    assert "damaged or cut short" in _refusal(tmp_path)


def test_a_sentencepiece_file_alone_names_the_package(tmp_path: Path) -> None:
    """Loading the tokenizer gives the same error as the plan."""
    _write(tmp_path, _files(["tokenizer.model"], {}))
    with pytest.raises(ModelError, match="pip install sentencepiece"):
        load_tokenizer(ModelSource(id=str(tmp_path)))


@pytest.mark.parametrize("classes", [["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["MistralForCausalLM"], None])
def test_language_models_plan_whatever_their_class_is_called(classes: Any, tmp_path: Path) -> None:
    """Old spellings, classes of other families and no class at all are accepted."""
    _write(tmp_path, _files([], {"architectures": classes}))
    structure_of(_recipe(tmp_path))
