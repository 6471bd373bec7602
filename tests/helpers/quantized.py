"""Tiny quantized checkpoints, made by the code of their formats' own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from llmprune.testing import tiny_model

Stored = dict[str, Tensor]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def quantize(
    folder: Path,
    settings: Mapping[str, Any],
    store: Callable[[str, Tensor], Stored],
    *,
    family: str = "llama",
    **fields: Any,
) -> Path:
    """Save a tiny bfloat16 model whose projections in the layers are replaced by the tensors that ``store`` returns.

    ``store``: gets the name of a weight, and the weight [O, I]. ``fields``: of the model's config.
    """
    tiny_model(family, **fields).to(torch.bfloat16).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors: Stored = {}
    for name, tensor in load_file(path).items():
        projection = tensor.ndim == 2 and ".layers." in name and ("_proj." in name or "fc" in name)
        tensors |= store(name, tensor) if projection else {name: tensor}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(settings)}))
    return folder


def store_fp8(settings: Mapping[str, Any]) -> Callable[[str, Tensor], Stored]:
    """Return a function that quantizes a weight as transformers does; the last block of a row may be smaller."""
    block = settings["weight_block_size"]
    config = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    operation = Fp8Quantize(SimpleNamespace(quantization_config=config))

    def store(name: str, weight: Tensor) -> Stored:
        made: Stored = operation.convert({name: weight})
        return {key: tensor.contiguous() for key, tensor in made.items()}

    return store
