"""Hidden states between layers: on the device that computes, in host memory, or in a memory-mapped file.

On a CPU they are the tensors that layers return. Those of a CUDA device stay on it as far as a budget allows; others
are copied to and from the host while the device computes, one batch ahead.

Shapes: B batch, L sequence length, D hidden size.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmprune.common.files import disk_errors
from llmprune.common.pinned_memory import pinning
from llmprune.layerwise.hidden_states.files import save_batches, saved_batches
from llmprune.layerwise.transfer import Arriving, CopyStream, CopyStreams, Event


class HiddenStates:
    """Hidden states [B, L, D] by batch: the tensors that were stored, on their devices."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> Tensor:
        """Return a batch where it is stored. The host waits for copies to it; ``at`` does not make it wait."""
        return self._batches[batch]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def __setitem__(self, batch: int, hidden_BLD: Tensor) -> None:
        self._batches[batch] = hidden_BLD

    @property
    def device(self) -> torch.device:
        """Device of the batch that was stored last, before it was copied to the host."""
        return self._batches[-1].device

    def at(self, batch: int, device: torch.device) -> Tensor:
        """Return a batch on a device. Batches that are asked for in order arrive one ahead."""
        return self._batches[batch].to(device)

    def append(self, hidden_BLD: Tensor) -> None:
        """Add the hidden states of the next batch."""
        self._batches.append(hidden_BLD)

    def save(self, path: Path) -> None:
        """Write all batches to a safetensors file."""
        save_batches(self, path)

    def load(self, path: Path) -> None:
        """Replace all batches by those that ``save`` wrote."""
        for batch, saved_BLD in enumerate(saved_batches(path)):
            self[batch] = saved_BLD.clone()


class ResidentHiddenStates(HiddenStates):
    """Hidden states on the CUDA device that computed them."""

    def __init__(self, copies: CopyStreams) -> None:
        super().__init__()
        self._copies = copies

    def save(self, path: Path) -> None:
        """Write all batches to a safetensors file."""
        on_host = [torch.empty(hidden_BLD.shape, dtype=hidden_BLD.dtype) for hidden_BLD in self]
        for hidden_BLD, memory in zip(self, on_host, strict=True):
            self._copies.on(hidden_BLD.device).send_pageable(hidden_BLD, memory)
        for memory in on_host:
            self._copies.settle(memory)
        save_batches(on_host, path)

    def load(self, path: Path) -> None:
        """Replace all batches by those that ``save`` wrote."""
        copies = self._copies.on(self.device)
        for batch, saved_BLD in enumerate(saved_batches(path)):
            self[batch] = copies.bring_pageable(saved_BLD).tensor()


class _HostHiddenStates(HiddenStates):
    """Hidden states in host memory of their own, which is overwritten when a batch is replaced.

    A CUDA device copies to and from it without making the host wait. Copies occur in the order in which they are asked
    for, whatever their devices.
    """

    def __init__(self, copies: CopyStreams) -> None:
        super().__init__()
        self._copies = copies
        self._device = torch.device("cpu")
        self._ahead: tuple[int, Arriving] | None = None
        self._last = -1

    def __setitem__(self, batch: int, hidden_BLD: Tensor) -> None:
        if self._ahead is not None and self._ahead[0] == batch:
            self._ahead = None
        self._device = hidden_BLD.device
        if self._device.type == "cuda":
            self._send(batch, hidden_BLD)
        else:
            self[batch].copy_(hidden_BLD)

    @property
    def device(self) -> torch.device:
        """Device of the batch that was stored last, before it was copied to the host."""
        return self._device

    def at(self, batch: int, device: torch.device) -> Tensor:
        """Return a batch on a device. Batches that are asked for in order arrive one ahead."""
        if device.type != "cuda":
            return self[batch].to(device)
        stream = self._copies.on(device)
        if self._ahead is not None and self._ahead[0] == batch and self._ahead[1].device == device:
            hidden_BLD = self._ahead[1].tensor()
            self._ahead = None
        else:
            hidden_BLD = self._bring(batch, stream).tensor()
        following = batch + 1
        in_order = batch == (self._last + 1) % len(self)
        if in_order and following < len(self) and self._ahead is None and stream.may_bring_ahead:
            self._ahead = (following, self._bring(following, stream))
        self._last = batch
        return hidden_BLD

    def append(self, hidden_BLD: Tensor) -> None:
        """Add the hidden states of the next batch."""
        self._batches.append(self._memory(hidden_BLD))
        self[len(self) - 1] = hidden_BLD

    def load(self, path: Path) -> None:
        """Replace all batches by those that ``save`` wrote."""
        self._ahead = None
        for hidden_BLD, saved_BLD in zip(self, saved_batches(path), strict=True):
            hidden_BLD.copy_(saved_BLD)

    def _memory(self, hidden_BLD: Tensor) -> Tensor:
        """Return host memory for a batch like this."""
        raise NotImplementedError

    def _bring(self, batch: int, stream: CopyStream) -> Arriving:
        raise NotImplementedError

    def _send(self, batch: int, hidden_BLD: Tensor) -> None:
        raise NotImplementedError


class PinnedHiddenStates(_HostHiddenStates):
    """Hidden states of a CUDA device in pinned host memory, ``size`` bytes in all.

    The memory is allocated once, in blocks of several batches: torch rounds each block up to a power of two.
    """

    def __init__(self, size: int, copies: CopyStreams) -> None:
        super().__init__(copies)
        self._left = size
        self._block = torch.empty(0, dtype=torch.uint8)
        self._copied: dict[torch.device, Event] = {}  # by device, the end of its last copy of any batch

    def __getitem__(self, batch: int) -> Tensor:
        self._settle()
        return self._batches[batch]

    def __iter__(self) -> Iterator[Tensor]:
        self._settle()
        return iter(self._batches)

    def _settle(self) -> None:
        for copied in self._copied.values():
            copied.synchronize()
        self._copied.clear()

    def _memory(self, hidden_BLD: Tensor) -> Tensor:
        size = hidden_BLD.numel() * hidden_BLD.element_size()
        if self._block.numel() < size:
            batches = min(_batches_in_block(size), math.ceil(self._left / size))
            with pinning():
                self._block = torch.empty(batches * size, dtype=torch.uint8, pin_memory=True)
        memory, self._block = self._block[:size], self._block[size:]
        self._left -= size
        return memory.view(hidden_BLD.dtype).view(hidden_BLD.shape)

    def _bring(self, batch: int, stream: CopyStream) -> Arriving:
        arriving = stream.bring(self._batches[batch], after=self._copied_by_others(stream.device))
        self._copied[stream.device] = arriving.copied
        return arriving

    def _send(self, batch: int, hidden_BLD: Tensor) -> None:
        device = hidden_BLD.device
        after = self._copied_by_others(device)
        self._copied[device] = self._copies.on(device).send(hidden_BLD, self._batches[batch], after=after)

    def _copied_by_others(self, device: torch.device) -> list[Event]:
        return [copied for other, copied in self._copied.items() if other != device]


class MappedHiddenStates(_HostHiddenStates):
    """Hidden states in a memory-mapped, unlinked temporary file of ``size`` bytes.

    A CUDA device copies through pinned buffers, where the host waits for the copy two batches before.
    """

    def __init__(self, size: int, folder: Path | None, *, copies: CopyStreams) -> None:
        super().__init__(copies)
        with disk_errors(folder or Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open as long as the hidden states are used
            self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
        self._used = 0

    def __getitem__(self, batch: int) -> Tensor:
        self._copies.settle(self._batches[batch])
        return self._batches[batch]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def _memory(self, hidden_BLD: Tensor) -> Tensor:
        mapped = torch.frombuffer(self._map, dtype=hidden_BLD.dtype, count=hidden_BLD.numel(), offset=self._used)
        self._used += hidden_BLD.numel() * hidden_BLD.element_size()
        return mapped.view(hidden_BLD.shape)

    def _bring(self, batch: int, stream: CopyStream) -> Arriving:
        return stream.bring_pageable(self[batch])

    def _send(self, batch: int, hidden_BLD: Tensor) -> None:
        self._copies.on(hidden_BLD.device).send_pageable(hidden_BLD, self[batch])


def _batches_in_block(size: int) -> int:
    """Return the number of batches of this many bytes whose block wastes the least when rounded to a power of two."""

    def waste(batches: int) -> float:
        block = batches * size
        return float(1 << (block - 1).bit_length()) / block

    return min(range(1, 17), key=waste)
