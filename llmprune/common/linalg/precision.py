"""Precision of sums over tokens and of the systems solved with them, on every device.

Products are float32 in full: TensorFloat-32 and bfloat16 keep 10 and 7 bits of a factor, and a Gram matrix of such
products has no Cholesky factor where its eigenvalues differ by more than that. Torch's settings for reduced sums of
half-precision products do not matter here, because the factors are float32.

Scalars and vectors are summed in float64 where the device has it. Matrices are float64 only where it is fast: gaming
and workstation GPUs compute it at 1/32 or 1/64 of their float32 rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_REDUCED = ("tf32", "bf16")
# Compute capabilities with float64 at half the rate of float32 or more: P100, V100, A100, H100, B200; MI200, MI300.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (9, 4), (9, 5), (10, 0)}


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the name of a type as a recipe has it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products in full float32 while the context lasts, whatever the user's setting.

    It sets ``fp32_precision`` alone. Reading that is always allowed, in contrast to ``allow_tf32`` and
    ``get_float32_matmul_precision``, which raise where both interfaces were used; the products read no other setting.
    """
    import torch

    cuda: Any = torch.backends.cuda
    cpu: Any = torch.backends.mkldnn
    changed = [
        (products, products.fp32_precision)
        for products in (cuda.matmul, cpu.matmul)
        if products.fp32_precision in _REDUCED
    ]
    for products, _ in changed:
        products.fp32_precision = "ieee"
    try:
        yield
    finally:
        for products, before in changed:
            products.fp32_precision = "none"  # inherits torch.backends.fp32_precision, as it may have done before
            if products.fp32_precision != before:
                products.fp32_precision = before


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums of values that are on ``device``: itself, or the CPU where it has none."""
    import torch

    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def float64_matrix_device(device: torch.device) -> torch.device:
    """Return the device for float64 matrices of values that are on ``device``: itself, or the CPU where it is slow."""
    import torch

    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64:
        return device
    return torch.device("cpu")


def in_float64(value: Tensor) -> Tensor:
    """Return a value in float64, on its device if that has it."""
    return value.to(float64_device(value.device)).double()


def float64_sum(value: Tensor) -> Tensor:
    """Return the sum of all elements in float64, a scalar on their device if that has it."""
    import torch

    return value.to(float64_device(value.device)).sum(dtype=torch.float64)
