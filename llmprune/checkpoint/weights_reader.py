"""Read tensors of a model from its weights files, memory-mapped, and converted as transformers converts them."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint.file_names import FileNames, Tensors
from llmprune.common.errors import CheckpointError


class WeightsReader:
    """Weights files of one checkpoint in ``folder``, opened when a tensor of theirs is first read.

    A tensor that needs no conversion is a view of the mapped file and takes no memory of the process. ``shown``: the
    model's name in messages.
    """

    def __init__(self, names: FileNames, folder: Path, *, shown: str) -> None:
        self.names, self.folder, self.shown = names, folder, shown
        self._opened: dict[str, _OpenFile] = {}

    def read(self, names: Iterable[str], *, dtypes: Mapping[str, torch.dtype] | None = None) -> Tensors:
        """Return tensors of the model by name: in these types, by default in those of the files.

        The tensors must not be changed in place. Raises CheckpointError where a file has changed since it was opened,
        is damaged or is missing.
        """
        self._require_unchanged()
        return self.names.convert(names, self._stored, dtypes=dtypes)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read one byte of every page that tensors of the model are made from, so that the pages are in memory.

        Tensors that no file has are left out. Raises as ``read``.
        """
        self._require_unchanged()
        for source in {source for name in names for source in self.names.sources(name)}:
            tensor = self._stored(source)
            tensor.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()

    def _require_unchanged(self) -> None:
        for file in self._opened.values():
            file.require_unchanged(self.shown)

    def stored(self, source: str) -> Tensor:
        """Return a tensor of the files as it is stored. Raises as ``read``."""
        self._require_unchanged()
        return self._stored(source)

    def _stored(self, source: str) -> Tensor:
        name = self.names.headers[source].file
        if name not in self._opened:
            self._opened[name] = _OpenFile(self.folder / name, self.shown)
        tensor: Tensor = self._opened[name].tensors.get_tensor(source)
        return tensor


class _OpenFile:
    """One weights file, mapped into memory."""

    def __init__(self, path: Path, shown: str) -> None:
        self.path = path
        try:
            self.tensors: Any = safe_open(path, framework="pt")
            self._size = path.stat().st_size
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"a weights file of {shown} cannot be read ({path.name}: {error}); it is missing, damaged or cut "
                "short: fetch it again"
            ) from error

    def require_unchanged(self, shown: str) -> None:
        """Raise CheckpointError where the file is gone or has another size: reading past its end kills a process."""
        size = self.path.stat().st_size if self.path.is_file() else None
        if size != self._size:
            state = "is gone" if size is None else f"has {size:,} bytes in place of {self._size:,}"
            raise CheckpointError(
                f"a weights file of {shown} changed while it was used: {self.path.name} {state}; fetch it again, then "
                "run the same command again"
            )
