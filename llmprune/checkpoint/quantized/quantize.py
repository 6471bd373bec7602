"""Quantize a weight as its format stores it, by the code of the format's own library.

Only formats whose scales follow from the weights alone: FP8, compressed-tensors and bitsandbytes. GPTQ and AWQ choose
their codes on calibration text, which is the work of their own tools.

Shapes: O outputs and I inputs of a matrix, G groups of inputs; R rows and C columns of a grid of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from llmprune.checkpoint.quantized.formats import Quantization
from llmprune.common.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors that the base stores for a weight, by what follows its path
Store = Callable[[str, Tensor, Shapes], dict[str, Tensor]]  # path, weight [O, I], base's shapes -> stored tensors

_TOOLS = {"gptq": "GPTQModel", "awq": "llm-compressor", "mxfp4": "the model's own tools", "mxfp8": "llm-compressor"}


def quantize_of(quantization: Quantization) -> Store:
    """Return the function that quantizes one weight. Raises ModelError for a format that is not written here."""
    method, settings = quantization.method, quantization.settings
    if method in _TOOLS:
        raise ModelError(
            f"export.requantize: {method} is not written here, for its codes depend on more than the weights; leave "
            f"requantize out, and quantize the result with {_TOOLS[method]}"
        )
    problem = quantization.problem("the model")
    if problem:
        raise ModelError(f"export.requantize: {problem}")
    if method == "fp8":
        if settings.get("activation_scheme", "dynamic") != "dynamic":
            raise _static(method)
        return _Float8(settings)
    return _CompressedTensors(settings) if method == "compressed-tensors" else _BitsAndBytes(settings)


def _static(method: str) -> ModelError:
    return ModelError(
        f"export.requantize: the base's {method} has fixed scales for activations, which a cut model needs anew; leave "
        "requantize out, and quantize the result with llm-compressor"
    )


class _Float8:
    """FP8 with a scale for each block, row or matrix, as transformers writes it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._block, self._scale_fmt = settings.get("weight_block_size"), settings.get("scale_fmt") or "float"

    def __call__(self, path: str, weight_OI: Tensor, base: Shapes) -> dict[str, Tensor]:  # noqa: PLR0917 - as Store
        name = next(name for name in ("weight_scale_inv", "weight_scale") if name in base)
        rows, columns = weight_OI.shape
        by_row = self._block is None and torch.Size(base[name]).numel() > 1
        block = self._block or ((1, columns) if by_row else (rows, columns))
        settings = SimpleNamespace(weight_block_size=tuple(block), scale_fmt=self._scale_fmt)
        padding = (0, -columns % block[1], 0, -rows % block[0])
        operation = Fp8Quantize(SimpleNamespace(quantization_config=settings))
        made = operation.convert({f"{path}.weight": nn.functional.pad(weight_OI, padding)})
        scales_RC = made[f"{path}.weight_scale_inv"]
        if self._block is None:
            scales_RC = scales_RC.reshape([rows, *(1 for _ in base[name][1:])] if by_row else [1 for _ in base[name]])
        codes_OI = made[f"{path}.weight"][:rows, :columns].contiguous()
        return {f"{path}.weight": codes_OI, f"{path}.{name}": scales_RC}


class _CompressedTensors:
    """The integer and FP8 formats of compressed-tensors, each weight by the scheme of its config group."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        quantization = import_module("compressed_tensors.quantization")
        self._config = quantization.QuantizationConfig.model_validate(dict(settings))
        self._format = self._config.format
        for scheme in self._config.config_groups.values():
            if scheme.input_activations is not None and not scheme.input_activations.dynamic:
                raise _static("compressed-tensors")
            strategy = _value(scheme.weights.strategy)
            if strategy not in ("tensor", "channel", "group", "block") or scheme.weights.num_bits not in (4, 8):
                raise ModelError(
                    f"export.requantize: compressed-tensors with the strategy {strategy} of {scheme.weights.num_bits} "
                    "bits is not written here; leave requantize out, and quantize the result with llm-compressor"
                )

    def __call__(self, path: str, weight_OI: Tensor, base: Shapes) -> dict[str, Tensor]:  # noqa: PLR0917 - as Store
        scheme = self._scheme(path, weight_OI)
        weights, floats_OI = scheme.weights, weight_OI.float()
        low, high = _ranges(floats_OI, weights, path=path)
        helpers = import_module("compressed_tensors.quantization.utils.helpers")
        scales, zeros = helpers.calculate_qparams(low, high, weights)
        scales = scales.to(weight_OI.dtype)
        state = {"weight": floats_OI.to(weight_OI.dtype), "weight_scale": scales, "weight_zero_point": zeros}
        registry = import_module("compressed_tensors.compressors").BaseCompressor
        made = registry.get_value_from_registry(scheme.format or self._format).compress(state, scheme)
        return {f"{path}.{name}": tensor.contiguous() for name, tensor in made.items()}

    def _scheme(self, path: str, weight_OI: Tensor) -> Any:
        match = import_module("compressed_tensors.utils.match")
        module = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], device="meta")
        for scheme in self._config.config_groups.values():
            if match.is_match(path, module, scheme.targets):
                return scheme
        raise ModelError(
            f"export.requantize: no config group of the base's compressed-tensors names {path} in the result (targets "
            "with numbers of layers do not follow a cut); leave requantize out"
        )


def _ranges(weight_OI: Tensor, weights: Any, *, path: str) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest weight of each tensor, output, group or block, as their scales are shaped."""
    strategy, (rows, columns) = _value(weights.strategy), weight_OI.shape
    if strategy == "tensor":
        return weight_OI.amin().reshape(1), weight_OI.amax().reshape(1)
    if strategy == "block":
        height, width = weights.block_structure
        padded = nn.functional.pad(weight_OI, (0, -columns % width, 0, -rows % height))
        parts = padded.reshape(-(-rows // height), height, -1, width)
        return parts.amin((1, 3)), parts.amax((1, 3))
    size = weights.group_size if strategy == "group" else columns
    if columns % size:
        raise ModelError(
            f"export.requantize: {path} has {columns} inputs, which groups of {size} do not divide; choose a width "
            f"that is a multiple of {size} (width.multiple), or leave requantize out"
        )
    parts = weight_OI.reshape(rows, -1, size)
    return parts.amin(-1), parts.amax(-1)


class _BitsAndBytes:
    """int8 with a scale for each output, or blocks of NF4 or FP4, by bitsandbytes' own functions."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._functions: Any = import_module("bitsandbytes.functional")
        self._is_8_bit = bool(settings.get("load_in_8bit"))
        self._kind = settings.get("bnb_4bit_quant_type", "fp4")
        self._nested = bool(settings.get("bnb_4bit_use_double_quant"))

    def __call__(self, path: str, weight_OI: Tensor, base: Shapes) -> dict[str, Tensor]:  # noqa: PLR0917 - as Store
        if self._is_8_bit:
            codes_OI, scales_O, _ = self._functions.int8_vectorwise_quant(weight_OI.to(torch.float16))
            made = {"weight": codes_OI, "SCB": scales_O}
            if "weight_format" in base:
                made["weight_format"] = torch.zeros(base["weight_format"], dtype=torch.uint8)
        else:
            packed, state = self._functions.quantize_4bit(
                weight_OI.contiguous(), compress_statistics=self._nested, quant_type=self._kind
            )
            made = {"weight": packed} | {f"weight.{key}": one for key, one in state.as_dict(packed=True).items()}
        return {f"{path}.{name}": tensor.contiguous() for name, tensor in made.items()}


def _value(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))
