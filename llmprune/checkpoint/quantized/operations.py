"""First operations of conversion rules, for formats that transformers dequantizes only as a whole model.

Shapes: I inputs and O outputs of a matrix, G groups of inputs, P integers packed into one of 32 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

Stored = Mapping[str, Tensor]  # the tensors of one weight, by the last part of their names

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # places of eight neighbouring columns in 32 bits


class Dequantize(ConversionOps):  # type: ignore[misc]  # transformers has no types
    """Operation that replaces the tensors that a format stores for each weight by the weight.

    ``stored``: last parts of their names.
    """

    stored: ClassVar[tuple[str, ...]]

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: Mapping[str, list[Tensor]],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Return the weights in the parameter's type; of experts a list by the pattern of their names."""
        parameter = model.get_parameter(full_layer_name)
        in_by_out = isinstance(model.get_submodule(full_layer_name.rpartition(".")[0]), Conv1D)
        by_weight: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, tensors in input_dict.items():
            part = next(part for part in sorted(self._parts(), key=len, reverse=True) if pattern.endswith(part))
            by_weight.setdefault(pattern.removesuffix(part), {})[part] = tensors
        made: dict[str, list[Tensor]] = {}
        for prefix, parts in by_weight.items():
            names, each = list(parts), zip(*parts.values(), strict=True)
            weights = [self.weight(dict(zip(names, one, strict=True))) for one in each]
            made[f"{prefix}weight" if prefix else full_layer_name] = [
                (weight.T if in_by_out else weight).to(parameter.dtype).contiguous() for weight in weights
            ]
        return made

    def _parts(self) -> set[str]:
        return {"weight", *self.stored}

    @abstractmethod
    def weight(self, stored: Stored) -> Tensor:
        """Return the matrix [O, I] of a linear layer. Raises ValueError for tensors that do not fit together."""


class DequantizeGptq(Dequantize):
    """GPTQ: integers packed along the inputs, with a scale and a zero for each group of inputs and each output.

    Source of the layout: AutoGPTQ and GPTQModel; ``checkpoint_format`` gptq holds every zero less one, gptq_v2
    the zero.
    """

    stored = ("qweight", "qzeros", "scales", "g_idx")

    def weight(self, stored: Stored) -> Tensor:  # noqa: D102
        scales_GO, packed = stored["scales"], stored["qweight"]
        settings = self.hf_quantizer.quantization_config.settings
        size = settings.get("group_size", 128)
        inputs = len(stored["g_idx"]) if "g_idx" in stored else len(scales_GO) * size
        bits = 32 * len(packed) // inputs
        if bits not in (2, 4, 8) or bits * inputs != 32 * len(packed):
            raise ValueError(f"{len(packed)} rows of 32 bits for {inputs} inputs are not of 2, 4 or 8 bits each")
        zeros = stored["qzeros"]
        if settings.get("checkpoint_format", "gptq") == "gptq":
            zeros = zeros + sum(1 << place for place in range(0, 31, bits))
        zeros_GO = _unpack(zeros, bits).flatten(1)[:, : scales_GO.shape[1]]
        codes_IO = _unpack(packed.T.contiguous(), bits).flatten(1).T
        group_I = stored["g_idx"].long() if "g_idx" in stored else torch.arange(inputs) // size
        return (scales_GO[group_I] * (codes_IO - zeros_GO[group_I])).T


class DequantizeAwq(Dequantize):
    """AWQ's layout gemm: four bits packed along the outputs in interleaved order, groups of successive inputs.

    Source of the layout: AutoAWQ.
    """

    stored = ("qweight", "qzeros", "scales")

    def weight(self, stored: Stored) -> Tensor:  # noqa: D102
        scales_GO, packed = stored["scales"], stored["qweight"]
        inputs, groups = len(packed), len(scales_GO)
        size = self.hf_quantizer.quantization_config.settings.get("group_size", 128)
        if groups * (inputs if size == -1 else size) != inputs:
            raise ValueError(f"{groups} groups of {size} for {inputs} inputs")
        codes_IO, zeros_GO = (_unpack(each, 4)[..., _AWQ_ORDER].flatten(1) for each in (packed, stored["qzeros"]))
        group_I = torch.arange(groups).repeat_interleave(inputs // groups)
        return ((codes_IO - zeros_GO[group_I]) * scales_GO[group_I]).T


class DequantizeBitsAndBytes(Dequantize):
    """bitsandbytes: 8 bits with a scale for each output, or blocks of 4 bits, by its own functions."""

    stored = (
        "weight",
        *(f"weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
        *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
        *("SCB", "weight_format"),
    )

    def weight(self, stored: Stored) -> Tensor:  # noqa: D102
        functions: Any = import_module("bitsandbytes.functional")
        weight = stored["weight"]
        if weight.is_meta:
            raise NotImplementedError  # the shape is stated in the values of a tensor
        if "SCB" in stored:
            if "weight_format" in stored and stored["weight_format"].item() != 0:
                raise ValueError("rows in an order that only some GPUs have")
            return functions.int8_vectorwise_dequant(weight, stored["SCB"])  # type: ignore[no-any-return]
        state = {name.removeprefix("weight."): tensor for name, tensor in stored.items() if name != "weight"}
        found = functions.QuantState.from_dict(state, device=weight.device)
        blocks = -(-found.shape.numel() // found.blocksize)
        if len(found.absmax) != blocks or 2 * weight.nbytes != found.shape.numel():
            raise ValueError(
                f"{len(found.absmax)} scales and {weight.nbytes} bytes for a matrix of {list(found.shape)}"
            )
        shape = found.shape  # bitsandbytes 0.50 on the CPU misreads rows that end within a block, but not a single one
        found.shape = torch.Size((1, shape.numel()))
        return functions.dequantize_4bit(weight.contiguous(), found).reshape(shape)  # type: ignore[no-any-return]


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the integers of int32 [X, Y], the lowest bits first, as int32 [X, Y, P]."""
    shifts_P = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes: Tensor = (packed[..., None] >> shifts_P) & (2**bits - 1)
    return codes
