"""Dequantize stacks of MXFP4 experts as transformers does, one expert at a time.

transformers needs several times the memory of the result for a whole stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.integrations.mxfp4 import Mxfp4Dequantize


class ExpertBlocks(Mxfp4Dequantize):  # type: ignore[misc]  # transformers has no types
    """Dequantization of a stack of experts from its blocks of 32 values and the scale of each block."""

    def convert(
        self, input_dict: Mapping[str, list[Tensor]], *, full_layer_name: str, **options: Any
    ) -> dict[str, Tensor]:
        """Return the stack [E, …] by its name. Raises ValueError where blocks and scales do not fit together."""
        stored = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        shapes = {name: tensor.shape[: 3 if name.endswith("_scales") else -1] for name, tensor in stored.items()}
        if len(stored) != 2 or len(set(shapes.values())) != 1:
            raise ValueError(f"blocks and scales of {', '.join(f'{list(shape)}' for shape in shapes.values())}")
        stack: Tensor | None = None
        experts = next(iter(shapes.values()))[0]
        for index in range(experts):
            one = {name: [tensor[index : index + 1]] for name, tensor in stored.items()}
            weight = super().convert(one, full_layer_name=full_layer_name, **options)[full_layer_name].detach()
            stack = weight.new_empty((experts, *weight.shape[1:])) if stack is None else stack
            stack[index] = weight[0]
        assert stack is not None, "a mixture has experts"
        return {full_layer_name: stack}
