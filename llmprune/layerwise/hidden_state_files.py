"""Files of hidden states [B, L, D], and the cache of the dense ones that pass 1 saves for pass 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune.common.files import disk_errors

if TYPE_CHECKING:
    from llmprune.layerwise.hidden_states import HiddenStates


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
