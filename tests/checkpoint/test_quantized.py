"""Quantized checkpoints: every layer of the walk has the weights that the format's own library dequantizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import verify_here
from helpers.quantized import (
    AWQ,
    FP8_BY_MATRIX,
    GPTQ,
    Stored,
    bitsandbytes,
    compressed,
    edit,
    fp8,
    grouped,
    mxfp4,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from llmprune.checkpoint.loading import load_config, load_model
from llmprune.checkpoint.model_memory import whole_model_bytes
from llmprune.checkpoint.open_decoder import open_decoder, open_reader
from llmprune.common.errors import CheckpointError
from llmprune.pipeline.run import run
from llmprune.planning.plan import plan_and_check
from llmprune.recipe.model import ModelSource
from llmprune.recipe.recipe import Recipe
from llmprune.testing import VOCABULARY, tiny_model

QUERY = "model.layers.1.self_attn.q_proj"
SCALES = f"{QUERY}.weight_scale_inv"
BY_LIBRARY: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "fp8-blocks": (fp8, FineGrainedFP8Config(dequantize=True)),
    "fp8-by-matrix": (lambda folder: fp8(folder, FP8_BY_MATRIX), FineGrainedFP8Config(dequantize=True)),
    "fp8-experts": (lambda folder: fp8(folder, family="qwen3_moe"), FineGrainedFP8Config(dequantize=True)),
    "mxfp4": (mxfp4, Mxfp4Config(dequantize=True)),
}


def _source(folder: Path, **options: Any) -> ModelSource:
    return ModelSource(id=str(folder), **options)


def _same(found: Stored, expected: Stored) -> bool:
    assert found
    return all(expected[name].dtype == one.dtype and torch.equal(expected[name], one) for name, one in found.items())


def _walked(folder: Path) -> Stored:
    """Return the tensors of all layers as a pass over them gets them."""
    decoder = open_decoder(_source(folder))
    layers = range(len(decoder))
    return {f"model.layers.{at}.{name}": one for at in layers for name, one in decoder.tensors(at).items()}


@pytest.mark.parametrize("kind", BY_LIBRARY)
def test_layers_and_whole_model_equal_those_that_transformers_dequantizes(kind: str, tmp_path: Path) -> None:
    """To the bit, in the walk and for the evaluation of the dense model; with experts one at a time."""
    save, config = BY_LIBRARY[kind]
    save(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype="auto").state_dict()
    assert _same(_walked(tmp_path), expected)
    assert _same(load_model(_source(tmp_path)).state_dict(), expected)


def test_a_whole_model_is_dequantized_with_a_part_on_disk(tmp_path: Path) -> None:
    """A limit of memory leaves layers on disk; the model computes the same."""
    fp8(tmp_path)
    ids = torch.arange(12)[None]
    expected = load_model(_source(tmp_path))(ids).logits
    model = load_model(_source(tmp_path, max_memory={"cpu": 60_000}))
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(model(ids).logits, expected)
    assert whole_model_bytes(_source(tmp_path)) == sum(
        one.nbytes for one in tiny_model("llama").bfloat16().parameters()
    )


@pytest.mark.parametrize("settings", [GPTQ, AWQ])
def test_packed_integers_are_unpacked_into_the_values_that_they_stand_for(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Codes, zeros and scales of groups of inputs, in the two layouts."""
    folder, values = grouped(tmp_path, settings)
    walked = _walked(folder)
    assert len(values) == 28
    assert all(torch.equal(walked[name], value) for name, value in values.items())


def test_the_last_blocks_of_fp8_may_be_smaller(tmp_path: Path) -> None:
    """DeepSeek-V3 has 576 rows in blocks of 128; the scale of a block holds for what the block has."""
    fp8(tmp_path)
    weight = torch.randn(32, 32).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [24, 20]

    def store(tensors: Stored) -> Stored:
        kept = {name: one.bfloat16() for name, one in tensors.items() if not name.endswith("_scale_inv")}
        return kept | {f"{QUERY}.weight": weight, SCALES: scales}

    edit(tmp_path, store)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = weight.float() * scales.repeat_interleave(24, 0)[:32].repeat_interleave(20, 1)[:, :32]
    assert torch.equal(_walked(tmp_path)[f"{QUERY}.weight"], expected.bfloat16())


def _cut_short(name: str) -> Callable[[Stored], Stored]:
    return lambda tensors: tensors | {name: tensors[name][:1].contiguous()}


def _without(*names: str) -> Callable[[Stored], Stored]:
    return lambda tensors: {name: one for name, one in tensors.items() if name not in names}


EXPERT = "model.layers.1.mlp.experts"
DAMAGE: dict[str, tuple[Callable[[Path], Any], Callable[[Stored], Stored], str]] = {
    "scales-cut-short": (fp8, _cut_short(SCALES), f"{QUERY}.weight (1 × 2 scales for a matrix of 32 × 32, which has 2"),
    "no-scales": (fp8, _without(SCALES), f"{QUERY}.weight (no scale is stored for it, in float8_e4m3fn)"),
    "scale-of-an-expert": (
        lambda folder: fp8(folder, family="qwen3_moe"),
        _without(f"{EXPERT}.2.up_proj.weight_scale_inv"),
        f"{EXPERT}.gate_up_proj (4 mlp.experts.*.gate_proj.weight",
    ),
    "blocks-without-scales": (mxfp4, _without(f"{EXPERT}.down_proj_scales"), f"{EXPERT}.down_proj (blocks and scales"),
    "mxfp4-scales-cut-short": (mxfp4, _cut_short(f"{EXPERT}.down_proj_scales"), f"{EXPERT}.down_proj (blocks and"),
    "gptq": (lambda folder: grouped(folder, GPTQ), _cut_short(f"{QUERY}.qweight"), f"{QUERY}.weight (1 rows of 32"),
    "awq": (lambda folder: grouped(folder, AWQ), _cut_short(f"{QUERY}.scales"), f"{QUERY}.weight (1 groups of 16 for"),
}


def _refusal(folder: Path) -> str:
    recipe = Recipe.parse(f"model: {{id: '{folder}'}}\ncalibration: {{dataset: text.txt}}\n")
    return "\n".join(line for line in plan_and_check(recipe).errors.listed() if line.startswith("model: "))


@pytest.mark.parametrize("kind", DAMAGE)
def test_tensors_that_do_not_fit_together_are_refused_before_the_walk(kind: str, tmp_path: Path) -> None:
    """The headers are enough: no weight is read."""
    save, damage, message = DAMAGE[kind]
    save(tmp_path)
    edit(tmp_path, damage)
    with pytest.raises(CheckpointError, match=re.escape(f"1 not dequantizable: {message}")):
        open_reader(_source(tmp_path))


def _with_settings(folder: Path, **settings: Any) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return _refusal(folder)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Another block size than that of the scales, and a format that nothing reads, with the reason and the remedy."""
    fp8(tmp_path)
    assert "2 × 6 scales for a matrix of 32 × 96, which has 1 × 3 blocks of 32 × 32" in _with_settings(
        tmp_path, weight_block_size=[32, 32]
    )
    assert "refused by its library (ValueError: weight_block_size must" in _with_settings(
        tmp_path, weight_block_size=[0]
    )
    refusal = _with_settings(tmp_path, quant_method="aqlm")
    assert "quantized by the method aqlm, which cannot be dequantized here; methods that can: awq, bits" in refusal
    assert "prune the original in float32" in refusal
    assert "gptq with 3 bits, and 2, 4 and 8 are read" in _with_settings(tmp_path, quant_method="gptq", bits=3)
    assert "awq with the layout 'gemv'" in _with_settings(tmp_path, quant_method="awq", bits=4, version="GEMV")


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the line that installs it."""
    monkeypatch.setattr("llmprune.checkpoint.quantized.formats.find_spec", lambda name: None)
    fp8(tmp_path)
    for method in ("compressed-tensors", "bitsandbytes"):
        refusal = _with_settings(tmp_path, quant_method=method)
        assert f"quantized by {method}, and dequantizing them needs" in refusal
        assert "pip install 'llmprune[quantized]'" in refusal


def test_a_config_without_a_type_gives_bfloat16(tmp_path: Path) -> None:
    """The files' own types are those of scales and of codes."""
    fp8(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({name: one for name, one in config.items() if name != "dtype"}))
    assert open_reader(_source(tmp_path)).names.model.dtype == torch.bfloat16
    assert not hasattr(load_config(_source(tmp_path)), "quantization_config")
    half = open_decoder(_source(tmp_path, dtype="float32")).tensors(0)
    assert {one.dtype for one in half.values()} == {torch.float32}


def test_a_run_prunes_a_quantized_mixture_into_a_plain_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cut leaves alone has the dequantized values, in separate experts; nothing says quantized any more."""
    verify_here(monkeypatch)
    base = fp8(tmp_path / "base", family="qwen3_moe")
    (base / "recipe.yaml").write_text("default_stage: {}\n")
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    recipe = Recipe.parse(
        f"model: {{id: '{base}'}}\ndepth: {{layers: [2]}}\nwidth: {{neurons: {{moe_intermediate_size: 32}}}}\n"
        f"calibration: {{tokens: '{tmp_path}/ids.safetensors', key: input_ids, samples: 4, sequence_length: 24, "
        "self_generated: 0}\nevaluation: {perplexity: null}\nrefit: false\n"
    )
    report = run(recipe, tmp_path / "run")
    model = tmp_path / "run" / "model"
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert not (model / "recipe.yaml").exists()
    stored = load_file(model / "model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.bfloat16}
    assert stored["model.layers.2.mlp.experts.3.gate_proj.weight"].shape == (32, 32)
    expected = load_model(_source(base)).state_dict()
    kept = {name: one for name, one in stored.items() if ".layers.2." in name and ".experts." not in name}
    assert _same({name.replace(".2.", ".3."): one for name, one in kept.items()}, expected)
    assert report.provenance.quantization == "fp8 (blocks of 16 × 16)"
    assert report.dense.bytes == sum(one.nbytes for one in load_model(_source(base)).parameters())
    assert any("the base is quantized by fp8" in warning for warning in report.warnings)


@pytest.mark.parametrize(("kind", "family"), [("int4", "llama"), ("int4", "qwen3_moe"), ("fp8", "qwen3_moe")])
def test_compressed_tensors_are_decompressed_by_their_library(kind: str, family: str, tmp_path: Path) -> None:
    """Packed and plain, and experts too; to the bit as in transformers."""
    compressed(tmp_path, kind, family)
    config = CompressedTensorsConfig(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype="auto").state_dict()
    assert _same(_walked(tmp_path), expected)
    scale = next(
        name for name in load_file(tmp_path / "model.safetensors") if name.endswith("1.self_attn.q_proj.weight_scale")
    )
    edit(tmp_path, _cut_short(scale))
    with pytest.raises(CheckpointError, match="1 not dequantizable"):
        open_reader(_source(tmp_path))


@pytest.mark.parametrize("settings", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_bitsandbytes_is_dequantized_by_its_library(settings: dict[str, Any], tmp_path: Path) -> None:
    """In eight and in four bits; to the bit as ``dequantize`` of the whole model."""
    options = {"dtype": "auto", "device_map": "cpu"}
    bitsandbytes(tmp_path / "base", settings)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options).dequantize().state_dict()
    assert _same(_walked(tmp_path / "base"), expected)
