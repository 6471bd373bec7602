"""Cache of the dense hidden states that pass 1 saves in files for pass 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmprune.layerwise.hidden_states.buffers import HiddenStates


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
