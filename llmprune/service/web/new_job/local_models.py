"""Models under the folders of ``--allow-root``: folders with a checkpoint, and GGUF files."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmprune.service.settings import Settings

_MAX_DEPTH = 4  # folders below a root
_MAX_ENTRIES = 5_000  # files and folders of a root that are looked at
_MAX_MODELS = 200
_FRESH = 30.0  # seconds
_CONFIGS = ("config.json", "adapter_config.json")


class LocalModels:
    """The models that recipes may name by a path, as they name them: relative to their root."""

    def __init__(self, settings: Settings) -> None:
        self._roots, self._hidden = settings.allow_roots, settings.data_dir.resolve()
        self._lock = threading.Lock()
        self._found: tuple[float, tuple[str, ...]] = (float("-inf"), ())

    def names(self) -> tuple[str, ...]:
        """Return the names of all models, sorted; at most 200."""
        with self._lock:  # one walk at a time
            made, names = self._found
            if time.monotonic() - made >= _FRESH:
                names = tuple(sorted({name for root in self._roots for name in self._of_root(root)})[:_MAX_MODELS])
                self._found = time.monotonic(), names
            return names

    def _of_root(self, root: Path) -> Iterator[str]:
        entries = 0
        for place, folders, files in os.walk(root):
            here = Path(place)
            depth = len(here.relative_to(root).parts)
            if here.resolve() == self._hidden:
                folders.clear()
                continue
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _MAX_DEPTH else []
            entries += len(files) + len(folders)
            yield from (_relative(here / name, root) for name in _models(files, here) if here != root or name)
            if entries > _MAX_ENTRIES:
                return


def _models(files: Sequence[str], folder: Path) -> Iterator[str]:
    """Return the models in a folder: "" for the folder itself, and its GGUF files; of a split file the first part."""
    has_weights = any(name.endswith(".safetensors") for name in files)
    if has_weights and any(name in files for name in _CONFIGS):
        yield ""
    for name in files:
        is_later_part = "-of-" in name and "-00001-of-" not in name
        if name.endswith(".gguf") and not name.startswith(".") and not is_later_part:
            yield name


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
