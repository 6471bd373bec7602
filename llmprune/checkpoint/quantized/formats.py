"""Formats of quantized weights: those that are dequantized when they are read, and the packages for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

CONFIG_FIELD = "quantization_config"
_INSTALL = "pip install 'llmprune[quantized]'"
# By method: the module that dequantizes it; empty where transformers or llmprune does.
_METHODS = {
    "fp8": "",
    "mxfp8": "",
    "mxfp4": "",
    "gptq": "",
    "awq": "",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
}


@dataclass(frozen=True)
class Quantization:
    """Quantization of a checkpoint's weights. ``settings``: the ``quantization_config`` of its config.json."""

    settings: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Name of the method; empty where none is stated."""
        if self.settings.get("load_in_8bit") or self.settings.get("load_in_4bit"):
            return "bitsandbytes"
        return str(self.settings.get("quant_method") or "")

    def describe(self) -> str:
        """Return the method with its bits, groups or blocks."""
        settings, method = self.settings, self.method
        block = settings.get("weight_block_size")
        details = {
            "fp8": f"blocks of {' × '.join(map(str, block))}" if block else "a scale for each matrix",
            "compressed-tensors": str(settings.get("format") or "several formats"),
            "bitsandbytes": "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4")),
        }
        grouped = f"{settings.get('bits', 4)} bits, groups of {settings.get('group_size', 128)}"
        detail = grouped if method in ("gptq", "awq") else details.get(method)
        return f"{method} ({detail})" if detail else method

    @property
    def short_name(self) -> str:
        """Format as names of repositories have it: fp8, w4a16, bnb-4bit."""
        settings, method = self.settings, self.method
        if method == "bitsandbytes":
            return "bnb-8bit" if settings.get("load_in_8bit") else "bnb-4bit"
        groups = settings.get("config_groups")
        names = {_bits_of(group) for group in groups.values()} if isinstance(groups, dict) else set()
        return next(iter(names)) if len(names) == 1 else method or "quantized"

    @property
    def package(self) -> str:
        """Name of the package that loads it in transformers; empty where none is needed."""
        return self.method if _METHODS.get(self.method) else ""

    def problem(self, shown: str) -> str:
        """Return the reason why the weights cannot be dequantized here; empty where they can. ``shown``: the model."""
        method = self.method
        if method not in _METHODS:
            named = f"by the method {method}" if method else "by a method that is not named"
            return (
                f"the weights of {shown} are quantized {named}, which cannot be dequantized here; methods that can: "
                f"{', '.join(sorted(_METHODS))}; prune the original in float32, bfloat16 or float16"
            )
        module = _METHODS[method]
        if module and find_spec(module) is None:
            return (
                f"the weights of {shown} are quantized by {method}, and dequantizing them needs a package that is not "
                f"installed: {_INSTALL}"
            )
        wrong = self._unread_setting()
        return f"the weights of {shown} are quantized by {method} with {wrong}" if wrong else ""

    def _unread_setting(self) -> str:
        settings, remedy = self.settings, "prune the original in float32, bfloat16 or float16"
        bits = settings.get("bits", 4)
        if self.method == "gptq" and bits not in (2, 4, 8):
            return f"{bits} bits, and 2, 4 and 8 are read; {remedy}"
        if self.method == "awq" and bits != 4:
            return f"{bits} bits, and 4 are read; {remedy}"
        version = str(settings.get("version") or "gemm").lower()
        if self.method == "awq" and version != "gemm":
            return f"the layout {version!r}, and gemm is read; {remedy}"
        return ""


def _bits_of(group: Mapping[str, Any]) -> str:
    """Return the bits of weights and activations of a scheme of compressed-tensors, such as w4a16."""
    weights, activations = group.get("weights") or {}, group.get("input_activations") or {}
    if weights.get("type") == "float":
        return f"fp{weights.get('num_bits', 8)}"
    return f"w{weights.get('num_bits', 8)}a{activations.get('num_bits', 16)}"


def without_quantization(config: dict[str, Any]) -> None:
    """Remove the quantization from the fields of a config.json, in place: a dequantized model has none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        part.pop(CONFIG_FIELD, None)


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """Return the quantization that a config.json states, at its top or for the text part; None where it states none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        stated = part.get(CONFIG_FIELD)
        if stated:
            return Quantization(stated if isinstance(stated, dict) else {})
    return None
