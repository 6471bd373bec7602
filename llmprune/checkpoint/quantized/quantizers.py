"""transformers' quantizers, in the mode that dequantizes every weight when it is read.

A quantizer adds to the conversion rules of a model the tensors that its format stores for a weight, and a first
operation that makes the weight from them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

from llmprune.anatomy.meta_model import Config, quiet_transformers, text_config
from llmprune.checkpoint.quantized.float8 import BlockScales
from llmprune.checkpoint.quantized.formats import CONFIG_FIELD, Quantization
from llmprune.checkpoint.quantized.mxfp4 import ExpertBlocks
from llmprune.checkpoint.quantized.operations import Dequantize, DequantizeAwq, DequantizeBitsAndBytes, DequantizeGptq
from llmprune.checkpoint.quantized.schemes import DequantizeCompressedTensors
from llmprune.common.errors import ModelError


def quantizer_of(quantization: Quantization) -> HfQuantizer:
    """Return the quantizer that dequantizes a format. Raises ModelError where nothing here, or its library, can."""
    problem = quantization.problem("the model")
    if problem:
        raise ModelError(problem)
    if not hasattr(HfQuantizer, "get_load_operations"):
        raise ModelError("a quantized checkpoint needs a newer transformers: pip install -U 'transformers>=5.23'")
    own = _OWN.get(quantization.method)
    if own is not None:
        return own(quantization)
    try:
        with quiet_transformers():
            config = AutoQuantizationConfig.from_dict(dict(quantization.settings))
            config.dequantize = True
            quantizer: HfQuantizer = _KINDS[quantization.method](config)
            quantizer.validate_environment()
    except Exception as error:  # a library's own checks raise its own classes
        raise ModelError(
            f"quantization_config of the model is refused by its library ({type(error).__name__}: {error}); correct "
            "it in config.json, or prune the original in float32, bfloat16 or float16"
        ) from error
    return quantizer


def drop_quantization(config: Config) -> Config:
    """Return a config without the quantization of its weights, which are dequantized when they are read."""
    for part in (config, text_config(config)):
        if getattr(part, CONFIG_FIELD, None) is not None:
            delattr(part, CONFIG_FIELD)
    return config


class _Float8(FineGrainedFP8HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """FP8 weights with a scale for each block or matrix."""

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": BlockScales}


class _Mxfp4(Mxfp4HfQuantizer):  # type: ignore[misc]
    """Experts in blocks of four-bit numbers, as gpt-oss has them."""

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": ExpertBlocks}


class _CompressedTensors(CompressedTensorsHfQuantizer):  # type: ignore[misc]
    """Weights of compressed-tensors, each with the scheme that names its module."""

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": DequantizeCompressedTensors}


class _OwnQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizer for a format that transformers dequantizes only as a whole model."""

    operation: ClassVar[type[Dequantize]]
    is_trainable = False

    def __init__(self, quantization: Quantization) -> None:
        settings = dict(quantization.settings)
        super().__init__(SimpleNamespace(dequantize=True, quant_method=quantization.method, settings=settings))

    def is_serializable(self) -> bool:
        return False

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": self.operation}

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return {"weight": list(dict.fromkeys(["weight", *self.operation.stored]))}


class _Gptq(_OwnQuantizer):
    operation = DequantizeGptq


class _Awq(_OwnQuantizer):
    operation = DequantizeAwq


class _BitsAndBytes(_OwnQuantizer):
    operation = DequantizeBitsAndBytes


_OWN: dict[str, type[_OwnQuantizer]] = {"gptq": _Gptq, "awq": _Awq, "bitsandbytes": _BitsAndBytes}
_KINDS: dict[str, type[HfQuantizer]] = {
    "fp8": _Float8,
    "mxfp8": _Float8,
    "mxfp4": _Mxfp4,
    "compressed-tensors": _CompressedTensors,
}
