"""Hidden states between layers: in memory, or in a memory-mapped file where they exceed a limit.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.common.files import disk_errors


@dataclass(frozen=True)
class HiddenStateCache:
    """Dense hidden states after every layer, which pass 1 saves in files for pass 2. Losing a file changes no result.

    ``key`` is part of the files' names and stands for everything that the hidden states depend on.
    """

    folder: Path
    key: str

    def keep(self, layer: int, hidden_states: HiddenStates) -> None:
        """Save the hidden states after a layer; the file appears whole or not at all."""
        path = self._path(layer)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        hidden_states.save(partial)
        partial.replace(path)

    def restore(self, layer: int, hidden_states: HiddenStates) -> bool:
        """Load the hidden states after a layer into ``hidden_states``; return False if there is no file."""
        path = self._path(layer)
        if not path.is_file():
            return False
        hidden_states.load(path)
        return True

    def remove(self) -> None:
        """Delete all files of the cache."""
        for path in self.folder.glob(f"{self.key}-*"):
            path.unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self.folder / f"{self.key}-{layer:05}.safetensors"


@dataclass(frozen=True)
class HiddenStateStore:
    """Settings for where hidden states are stored.

    A buffer of up to ``limit`` bytes is in memory, a larger one in a file in ``folder``; without a limit all are in
    memory. ``cache``: the dense hidden states of pass 1, if they are saved.
    """

    limit: int | None = None
    folder: Path | None = None
    cache: HiddenStateCache | None = None

    def allocate(self, first_BLD: Tensor, windows: int) -> HiddenStates:
        """Return an empty buffer for this many windows, each shaped like those of ``first_BLD``."""
        size = first_BLD[0].numel() * first_BLD.element_size() * windows
        if self.limit is None or size <= self.limit:
            return HiddenStates()
        return MappedHiddenStates(size, self.folder)


class HiddenStates:
    """Hidden states [B, L, D] by batch, in (pinned) memory."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> Tensor:
        return self._batches[batch]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def __setitem__(self, batch: int, hidden_BLD: Tensor) -> None:
        self._batches[batch] = _to_memory(hidden_BLD)

    def append(self, hidden_BLD: Tensor) -> None:
        """Add the hidden states of the next batch."""
        self._batches.append(_to_memory(hidden_BLD))

    def save(self, path: Path) -> None:
        """Write all batches to a safetensors file."""
        tensors = {f"{batch:06}": hidden_BLD.contiguous() for batch, hidden_BLD in enumerate(self)}
        with disk_errors(path.parent):
            save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Replace all batches by those that ``save`` wrote."""
        with safe_open(path, framework="pt") as file:
            for batch, name in enumerate(sorted(file.keys())):
                self[batch] = file.get_tensor(name).clone()


class MappedHiddenStates(HiddenStates):
    """Hidden states in a memory-mapped, unlinked temporary file of ``size`` bytes."""

    def __init__(self, size: int, folder: Path | None) -> None:
        super().__init__()
        with disk_errors(folder or Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open as long as the hidden states are used
            self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
        self._used = 0

    def __setitem__(self, batch: int, hidden_BLD: Tensor) -> None:
        self._batches[batch].copy_(hidden_BLD)

    def append(self, hidden_BLD: Tensor) -> None:
        """Add the hidden states of the next batch."""
        mapped = torch.frombuffer(self._map, dtype=hidden_BLD.dtype, count=hidden_BLD.numel(), offset=self._used)
        self._used += hidden_BLD.numel() * hidden_BLD.element_size()
        self._batches.append(mapped.view(hidden_BLD.shape).copy_(hidden_BLD))


def _to_memory(hidden_BLD: Tensor) -> Tensor:
    return hidden_BLD.cpu().pin_memory() if hidden_BLD.is_cuda else hidden_BLD
