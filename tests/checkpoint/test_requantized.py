"""Results in the format that their base is quantized in (``export.requantize``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command, report_in, verify_here, write_recipe, write_text
from helpers.quantized import FP8_BY_MATRIX, GPTQ, bitsandbytes, compressed, edit, fp8, grouped
from helpers.tiny import tiny_tokenizer
from safetensors.torch import load_file
from torch import Tensor

from llmprune.checkpoint.loading import load_model
from llmprune.checkpoint.quantized.formats import Quantization, quantization_of
from llmprune.checkpoint.result.requantized import QuantizedBase, write_requantized
from llmprune.checkpoint.weight_headers import headers_of_folder
from llmprune.recipe.model import ModelSource

CODES = (torch.float8_e4m3fn, torch.int8, torch.int32, torch.uint8)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BASES: dict[str, Callable[[Path], Any]] = {
    "fp8-blocks": lambda folder: fp8(folder, intermediate_size=88),  # the last block is smaller
    "fp8-by-matrix": lambda folder: fp8(folder, FP8_BY_MATRIX),
    "fp8-experts": lambda folder: fp8(folder, family="qwen3_moe"),
    "int4": lambda folder: compressed(folder, "int4", "llama"),
    "int8-experts": lambda folder: compressed(folder, "int8", "qwen3_moe"),
    "compressed-fp8": lambda folder: compressed(folder, "fp8", "llama"),
    "nf4": lambda folder: bitsandbytes(folder, NF4, intermediate_size=96),  # rows end within a block
    "bnb-int8": lambda folder: bitsandbytes(folder, {"load_in_8bit": True}),
}


def load(folder: Path) -> dict[str, Tensor]:
    """Return a model's weights as llmprune dequantizes them."""
    found: dict[str, Tensor] = load_model(ModelSource(id=str(folder), dtype="float32")).state_dict()
    return found


@pytest.mark.parametrize("kind", BASES)
def test_a_model_that_lost_nothing_is_stored_as_its_base(kind: str, tmp_path: Path) -> None:
    """Names, types and shapes are the base's; weights differ by less than a step of the format."""
    base = tmp_path / "base"
    BASES[kind](base)
    dense = load_model(ModelSource(id=str(base), dtype="float32"))
    dense.save_pretrained(tmp_path / "plain")
    config = json.loads((base / "config.json").read_text())
    quantization = quantization_of(config)
    assert quantization is not None
    layers = range(config["num_hidden_layers"])
    origin = QuantizedBase(quantization, headers_of_folder(base, "base"), layers, "model.layers")
    count = write_requantized(tmp_path / "plain", tmp_path / "again", base=origin)
    stored, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "base"))
    assert stored.keys() == expected.keys()
    quantized = [name for name in expected if "_proj.weight" in name and expected[name].dtype in CODES]
    quantized = [name for name in quantized if name.endswith(("weight", "packed"))]
    assert count == len(quantized)
    for name in quantized:
        assert (stored[name].dtype, stored[name].shape) == (expected[name].dtype, expected[name].shape), name
    written, original = load(tmp_path / "again"), load(base)
    for name, weight in original.items():
        step = 0.2 if weight.ndim > 1 else 0.0
        assert float((written[name] - weight).abs().max()) <= step * float(weight.abs().max()), name


def test_four_bits_are_read_where_rows_end_within_a_block(tmp_path: Path) -> None:
    """Weights are the codes' values times the scale of their block, also where bitsandbytes reads them wrongly."""
    base = bitsandbytes(tmp_path / "base", NF4, intermediate_size=96)
    stored, name = load_file(base / "model.safetensors"), "model.layers.0.mlp.down_proj.weight"
    packed = stored[name].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    expected = (stored[f"{name}.quant_map"][codes].view(-1, 64) * stored[f"{name}.absmax"][:, None]).view(64, 96)
    torch.testing.assert_close(load(base)[name], expected, rtol=1e-2, atol=1e-3)


def test_a_pruned_model_has_the_format_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and what is left out have new numbers; the report says how far the quantized result is; both reload."""
    verify_here(monkeypatch)
    base, text = fp8(tmp_path / "base", vocab_size=260), write_text(tmp_path / "text.txt")
    tiny_tokenizer().save_pretrained(base)
    plain = "model.layers.3.mlp.down_proj"
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", plain]
    (base / "config.json").write_text(json.dumps(config))

    def restore(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors.pop(f"{plain}.weight_scale_inv")
        return tensors | {f"{plain}.weight": tensors[f"{plain}.weight"].to(torch.bfloat16)}

    edit(base, restore)
    sections = {"depth": {"layers": [1]}, "width": {"neurons": 64}, "export": {"requantize": True}}
    recipe = write_recipe(tmp_path / "recipe.yaml", base, text, **sections)
    for _ in range(2):
        done = command("run", recipe, "--output", tmp_path / "out")
        assert done.code == 0, done.err
    report, folder = report_in(tmp_path / "out"), tmp_path / "out" / "quantized"
    figures = report["requantized"]
    assert figures["format"] == "fp8 (blocks of 16 × 16)"
    assert 0 < figures["divergence"] < 0.1
    assert report["files"]["quantized"] == str(folder)
    stored = load_file(folder / "model.safetensors")
    assert figures["weights"] == sum(name.endswith("_scale_inv") for name in stored) == 3 * 7 - 1
    assert figures["bytes"] < (tmp_path / "out/model/model.safetensors").stat().st_size
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == ["lm_head", "model.layers.2.mlp.down_proj"]
    assert stored["model.layers.2.mlp.down_proj.weight"].dtype == torch.bfloat16
    written, pruned = load(folder), load(tmp_path / "out/model")
    assert written.keys() == pruned.keys()
    assert torch.equal(written["model.norm.weight"], pruned["model.norm.weight"])


@pytest.mark.parametrize("kind", ["plain", "gptq", "static"])
def test_what_cannot_be_written_is_refused_by_the_plan(kind: str, workspace: Path, tmp_path: Path) -> None:
    """The sentence says why, and which tool does it."""
    base, said = workspace / "base", "is not quantized"
    if kind == "gptq":
        base, said = grouped(tmp_path / "base", GPTQ)[0], "GPTQModel"
    if kind == "static":
        base, said = fp8(tmp_path / "base"), "fixed scales for activations"
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"]["activation_scheme"] = "static"
        (base / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path / "r.yaml", base, workspace / "text.txt", export={"requantize": True})
    done = command("plan", recipe)
    assert done.code == 2, done.err
    assert said in done.err
    assert "export.requantize" in done.err


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-4bit"),
        ({"load_in_8bit": True}, "bnb-8bit"),
        ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}, "w4a16"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, "w8a8"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8"),
        ({"config_groups": {"a": {"weights": {}}, "b": {"weights": {"num_bits": 4}}}}, "compressed-tensors"),
    ],
)  # fmt: skip
def test_the_format_in_a_name(settings: dict[str, object], name: str) -> None:
    """Names are those that people look for on the hub."""
    assert Quantization({"quant_method": "compressed-tensors"} | settings).short_name == name
