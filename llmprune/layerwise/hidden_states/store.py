"""Choice of the place for hidden states between layers: device, host memory, or a memory-mapped file."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from llmprune.layerwise.hidden_states.buffers import (
    HiddenStates,
    MappedHiddenStates,
    PinnedHiddenStates,
    ResidentHiddenStates,
)
from llmprune.layerwise.hidden_states.cache import HiddenStateCache
from llmprune.layerwise.transfer import CopyStreams


@dataclass
class _Budget:
    """Bytes that live buffers take."""

    used: int = 0

    def release(self, size: int) -> None:
        """Give back the bytes of a buffer."""
        self.used -= size


@dataclass(frozen=True)
class HiddenStateStore:
    """Settings for where hidden states are stored.

    Buffers of a CUDA device that together take up to ``device_bytes`` stay on it; a buffer that is freed gives its
    bytes back. Of the others one of up to ``limit`` bytes is in host memory, pinned if it is a CUDA device's, and a
    larger one in a file in ``folder``; without a limit all are in memory. ``cache``: the dense hidden states of pass 1,
    if they are saved.
    """

    limit: int | None = None
    folder: Path | None = None
    cache: HiddenStateCache | None = None
    device_bytes: int = 0
    _on_device: _Budget = field(default_factory=_Budget, repr=False, compare=False)
    _copies: CopyStreams = field(default_factory=CopyStreams, repr=False, compare=False)

    def allocate(self, first_BLD: Tensor, windows: int) -> HiddenStates:
        """Return an empty buffer for this many windows, each shaped like those of ``first_BLD``.

        They are computed on the device of ``first_BLD``.
        """
        size = first_BLD[0].numel() * first_BLD.element_size() * windows
        if first_BLD.device.type == "cuda" and self._on_device.used + size <= self.device_bytes:
            resident = ResidentHiddenStates(self._copies)
            self._on_device.used += size
            weakref.finalize(resident, self._on_device.release, size)
            return resident
        if self.limit is not None and size > self.limit:
            return MappedHiddenStates(size, self.folder, copies=self._copies)
        return PinnedHiddenStates(size, self._copies) if first_BLD.device.type == "cuda" else HiddenStates()
