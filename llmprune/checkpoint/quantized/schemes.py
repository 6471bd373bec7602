"""Dequantize weights of compressed-tensors by the library's own code, each with the scheme of its module."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.compressed_tensors import get_dense_scheme, get_experts_scheme

from llmprune.checkpoint.quantized.operations import Dequantize, Stored


class DequantizeCompressedTensors(Dequantize):
    """Weights of compressed-tensors. Its config groups have schemes, each for the modules that it targets.

    transformers takes one scheme for all modules, and one for all experts.
    """

    stored = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
    _scheme: Any

    def convert(
        self, input_dict: Mapping[str, list[Tensor]], *, full_layer_name: str, model: PreTrainedModel, **options: Any
    ) -> dict[str, list[Tensor]]:
        """Return weights as ``Dequantize`` does."""
        match = import_module("compressed_tensors.utils.match")
        config = self.hf_quantizer.compressor.quantization_config
        path = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(path)
        groups = config.config_groups.values()
        matching = [group for group in groups if match.is_match(path, module, group.targets)]
        experts = any("*" in pattern for pattern in input_dict)
        self._scheme = next(iter(matching), None) or (get_experts_scheme if experts else get_dense_scheme)(config)
        return super().convert(input_dict, full_layer_name=full_layer_name, model=model, **options)

    def weight(self, stored: Stored) -> Tensor:  # noqa: D102
        compressors = import_module("compressed_tensors.compressors")
        if "weight_scale" not in stored:
            raise ValueError("no scale is stored for it")
        self._require_scales(stored)
        packed = stored.get("weight_packed")
        if packed is not None and packed.is_meta and self._scheme.weights.group_size is None:
            raise NotImplementedError  # the number of columns is stated in the values of a tensor
        format_of_all = self.hf_quantizer.compressor.quantization_config.format
        compressor = compressors.BaseCompressor.get_value_from_registry(self._scheme.format or format_of_all)
        weight: Tensor = compressor.decompress(dict(stored), self._scheme)["weight"]
        return weight

    def _require_scales(self, stored: Stored) -> None:
        """Raise ValueError for scales of another shape than the scheme's, which it may spread over all rows."""
        weights, scales = self._scheme.weights, stored["weight_scale"]
        matrix = stored["weight_packed"] if "weight_packed" in stored else stored["weight"]
        strategy, rows, columns = getattr(weights.strategy, "value", weights.strategy), *matrix.shape[-2:]
        wanted = [rows, 1]
        if strategy == "tensor":
            wanted = [1, 1]
        elif strategy == "block":
            block = weights.block_structure
            wanted = [-(-rows // block[0]), -(-columns // block[1])]
        elif weights.group_size is not None and weights.group_size > 0:
            wanted = [rows, scales.shape[-1] if "weight_packed" in stored else -(-columns // weights.group_size)]
        if scales.numel() != wanted[0] * wanted[1]:
            raise ValueError(f"scales of {list(scales.shape)}, and {strategy} has {wanted}")
