"""Files of hidden states [B, L, D], one tensor a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.common.files import disk_errors


def save_batches(batches: Iterable[Tensor], path: Path) -> None:
    """Write batches to a safetensors file. Raises DiskError where that fails."""
    tensors = {f"{batch:06}": hidden_BLD.contiguous() for batch, hidden_BLD in enumerate(batches)}
    with disk_errors(path.parent):
        save_file(tensors, path)


def saved_batches(path: Path) -> Iterator[Tensor]:
    """Yield the batches that ``save_batches`` wrote, in their order, as views of the mapped file."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield file.get_tensor(name)
