"""Tiny quantized checkpoints, made by the code of their formats' own libraries where these are installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from llmprune.testing import tiny_model

Stored = dict[str, Tensor]
Store = Callable[[str, Tensor], Stored]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
FP8_BY_MATRIX = FP8 | {"weight_block_size": None}
MXFP4 = {"quant_method": "mxfp4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def quantize(folder: Path, settings: Mapping[str, Any], store: Store, *, family: str = "llama", **fields: Any) -> Path:
    """Save a tiny bfloat16 model whose projections in the layers are replaced by the tensors that ``store`` returns.

    ``store``: gets the name of a weight, and the weight [O, I] or [E, I, O]. ``fields``: of the model's config.
    """
    tiny_model(family, **fields).to(torch.bfloat16).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors: Stored = {}
    for name, tensor in load_file(path).items():
        projection = ".layers." in name and name.removesuffix(".weight").endswith("_proj")
        tensors |= store(name, tensor) if projection else {name: tensor}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(settings)}))
    return folder


def fp8(folder: Path, settings: Mapping[str, Any] = FP8, **model: Any) -> Path:
    """Save a model in FP8, quantized by transformers."""
    config = SimpleNamespace(weight_block_size=settings["weight_block_size"], scale_fmt="float")
    operation = Fp8Quantize(SimpleNamespace(quantization_config=config))
    return quantize(folder, settings, lambda name, weight: operation.convert({name: weight}), **model)


def mxfp4(folder: Path) -> Path:
    """Save a gpt-oss whose experts are random blocks of MXFP4, every one of which is a valid one."""
    random = torch.Generator().manual_seed(0)

    def store(name: str, weight: Tensor) -> Stored:
        if weight.ndim != 3:
            return {name: weight}
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=random)
        scales = torch.randint(115, 121, blocks.shape[:-1], dtype=torch.uint8, generator=random)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    return quantize(folder, MXFP4, store, family="gpt_oss", hidden_size=64)


def _codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return four-bit codes [O, I], zeros [O, G] and scales [O, G] in groups of 16."""
    groups = weight.float().unflatten(1, (-1, 16))
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_min(1e-6).half()
    zeros = (-low / scales.float()).round().clamp(1, 15).int()
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).int()
    return codes.flatten(1), zeros, scales


def _pack(codes: Tensor) -> Tensor:
    """Pack four-bit integers along the last dimension, the first in the lowest bits."""
    shifted = codes.unflatten(-1, (-1, 8)).long() << torch.arange(0, 32, 4)
    packed: Tensor = shifted.sum(-1)
    return packed.to(torch.int32)


def grouped(folder: Path, settings: Mapping[str, Any], **model: Any) -> tuple[Path, Stored]:
    """Save a model in the layout of GPTQ or AWQ; return its folder and the values of its quantized weights."""
    values: Stored = {}

    def store(name: str, weight: Tensor) -> Stored:
        codes, zeros, scales = _codes(weight)
        by_input = (codes.unflatten(1, (-1, 16)) - zeros[..., None]).half() * scales[..., None]
        values[name] = by_input.flatten(1).to(torch.bfloat16)
        prefix = name.removesuffix("weight")
        parts = {"scales": scales.T.contiguous()}
        if settings["quant_method"] == "gptq":
            index = torch.arange(weight.shape[1], dtype=torch.int32) // 16
            parts |= {"qweight": _pack(codes).T.contiguous(), "qzeros": _pack(zeros.T - 1), "g_idx": index}
        else:
            interleaved = [each.T.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1) for each in (codes, zeros)]
            parts |= dict(zip(("qweight", "qzeros"), map(_pack, interleaved), strict=True))
        return {prefix + part: tensor for part, tensor in parts.items()}

    return quantize(folder, settings, store, **model), values


def edit(folder: Path, change: Callable[[Stored], Stored]) -> None:
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


COMPRESSED = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}


def compressed(folder: Path, kind: str, family: str) -> Path:
    """Save a model as compressed-tensors compresses it."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    name, arguments = COMPRESSED[kind]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**arguments))
    compressor = compressors.BaseCompressor.get_value_from_registry(name)

    def store(path: str, weight: Tensor) -> Stored:
        largest = weight.unflatten(1, (-1, arguments.get("group_size", weight.shape[1]))).abs().amax(-1)
        scale = largest / (448 if arguments["type"] == "float" else 2 ** (arguments["num_bits"] - 1) - 1)
        made = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        return {path.removesuffix("weight") + part: tensor.contiguous() for part, tensor in made.items()}

    group = {"group_0": {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": name}}
    settings = {"quant_method": "compressed-tensors", "format": name, "config_groups": group, "ignore": ["lm_head"]}
    return quantize(folder, settings | {"quantization_status": "compressed"}, store, family=family)


def bitsandbytes(folder: Path, settings: Mapping[str, Any], *, intermediate_size: int = 128) -> Path:
    """Save a model as bitsandbytes quantizes it."""
    pytest.importorskip("bitsandbytes")
    with TemporaryDirectory() as plain:
        tiny_model(
            "llama", hidden_size=64, head_dim=16, intermediate_size=intermediate_size
        ).bfloat16().save_pretrained(plain)
        options = {"dtype": "auto", "device_map": "cpu", "quantization_config": BitsAndBytesConfig(**settings)}
        AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    return folder
