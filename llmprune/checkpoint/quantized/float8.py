"""Dequantize FP8 weights as transformers does, with the blocks that their config states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


class BlockScales(Fp8Dequantize):  # type: ignore[misc]  # transformers has no types
    """Dequantization of FP8 weights by blocks, of which the last ones may be smaller.

    transformers derives the size of a block from the numbers of weights and scales, which fails where the last block
    is smaller (DeepSeek-V3 has 576 rows in blocks of 128), and misreads scales that are cut short. Shapes: R rows and
    C columns of a weight, r and c of its scales.
    """

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:  # noqa: PLR0917 - as in transformers
        """Return a weight [..., R, C]. ``scales``: [..., r, c], or one of the matrix or of each row."""
        if not quantized.is_floating_point():  # FP4 in bytes, with blocks of its own
            return self._library(quantized, scales, dtype=output_dtype)
        block, (rows, columns) = self._block(), quantized.shape[-2:]
        if block is None:
            if scales.numel() not in (1, rows):
                raise ValueError(f"{_shape(scales)} scales for a matrix of {_shape(quantized)}; it has 1 or {rows}")
            return self._library(quantized, scales.reshape(-1, 1) if scales.numel() > 1 else scales, dtype=output_dtype)
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        if tuple(scales.shape[-2:]) != grid:
            blocks = f"{grid[0]} × {grid[1]} blocks of {block[0]} × {block[1]}"
            raise ValueError(f"{_shape(scales)} scales for a matrix of {_shape(quantized)}, which has {blocks}")
        padding = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
        if any(padding):
            # as bytes: torch pads no FP8, and zero bytes are zeros of it
            quantized = nn.functional.pad(quantized.view(torch.uint8), padding).view(quantized.dtype)
        return self._library(quantized, scales, dtype=output_dtype)[..., :rows, :columns].contiguous()

    def _block(self) -> tuple[int, int] | None:
        """Return rows and columns of a block; None where a matrix or row has one scale."""
        config = self.hf_quantizer.quantization_config
        if config.quant_method == "mxfp8":
            return (1, 32)
        block: tuple[int, int] | None = config.weight_block_size
        return block

    def _library(self, quantized: Tensor, scales: Tensor, *, dtype: torch.dtype | None) -> Tensor:
        dequantized: Tensor = super()._dequantize_one(quantized, scales, output_dtype=dtype)
        return dequantized


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) or "1"
