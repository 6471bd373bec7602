"""The arithmetic of a training on the device of this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from llmprune.common.distributed import local_device


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic of a training on ``device``.

    ``quick``: products in bfloat16. ``save_memory``: activations of a layer are computed again in the backward pass.
    """

    device: torch.device
    quick: bool
    save_memory: bool

    @classmethod
    def here(cls, precision: Literal["auto", "float32", "bfloat16"], *, save_memory: bool | None = None) -> Arithmetic:
        """Return the arithmetic on this device. ``auto``: bfloat16 where it has instructions for that.

        ``save_memory``: by default on a GPU.
        """
        device = local_device()
        has_instructions = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_is_quick()
        quick = has_instructions if precision == "auto" else precision == "bfloat16"
        return cls(device, quick, device.type == "cuda" if save_memory is None else save_memory)


def _cpu_is_quick() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
