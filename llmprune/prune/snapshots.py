"""Snapshots of pass 2, saved every few layers or seconds, from which a killed run continues.

The folder of the finished layers also holds the dense and pruned hidden states after one of the last layers, in two
alternating slots, and ``progress.json``, which is replaced atomically after all files that it names. Whenever the run
is killed, it names a consistent state. Saving takes at most 1 % of the time: where a layer takes minutes every layer
is saved, where it takes seconds a few layers are done again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

from llmprune.common.distributed import all_agree, broadcast_from_first, is_first_process, rank, world_size
from llmprune.common.files import disk_errors, fsync, write_text
from llmprune.layerwise.hidden_states.buffers import HiddenStates
from llmprune.layerwise.hidden_states.files import saved_batches
from llmprune.prune.records import LayerRecord

_DURABLE = "LLMPRUNE_DURABLE_SNAPSHOTS"  # environment variable: 1 for runs that may continue on another machine
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Progress:
    """State of a run of pass 2 without its hidden states: finished layers, and measured ``ResidualScales``."""

    records: list[LayerRecord] = field(default_factory=list)
    scales: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Saved:
    """Contents of ``progress.json``. ``slot``: which of the two copies of the hidden states is valid."""

    progress: Progress
    slot: int


def boot() -> str:
    """Return an identifier of the machine's current boot; empty where the system has none."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


class Snapshots:
    """Snapshots in ``folder``, valid for one fingerprint, number of processes and boot of the machine.

    ``share``: largest share of the run's time that saving may take; ``streams``: names of the hidden states that are
    saved. They are not flushed to disk at every layer, so that those saved before a crash of the machine are not used;
    with ``LLMPRUNE_DURABLE_SNAPSHOTS`` they are flushed, and valid on every machine.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        *,
        share: float = 0.01,
        streams: Sequence[str] = ("dense", "pruned"),
    ) -> None:
        self.folder, self.share, self._streams = folder, share, tuple(streams)
        self._slot, self._saved_at, self._seconds = 0, -math.inf, 0.0
        self._durable = os.environ.get(_DURABLE) == "1"
        self._key = {"fingerprint": fingerprint, "processes": world_size(), "boot": "" if self._durable else boot()}

    def load(self) -> Progress:
        """Return the last saved progress, the same in every process.

        Returns an empty one, and empties the folder, if nothing is saved or it is another run's.
        """
        saved = broadcast_from_first(self._read() if is_first_process() else None) or _Saved(Progress(), 0)
        self._slot = saved.slot
        has_records = bool(saved.progress.records)
        if not all_agree(all(path.is_file() for path in self._files()) if has_records else True) or not has_records:
            self._clear()
            return Progress()
        return saved.progress

    def restore(self, streams: Sequence[HiddenStates]) -> None:
        """Load the hidden states that belong to the loaded progress, which may have been saved in other batches."""
        for hidden_states, path in zip(streams, self._files(), strict=True):
            _load(path, hidden_states)

    def save(self, progress: Progress, streams: Sequence[HiddenStates]) -> None:
        """Save the progress after one more layer, whose tensors are written, if the last time is long enough ago."""
        start = time.monotonic()
        if not broadcast_from_first((start - self._saved_at) * self.share >= self._seconds):
            return
        self._slot = 1 - self._slot
        for hidden_states, path in zip(streams, self._files(), strict=True):
            path.unlink(missing_ok=True)  # a copy of the snapshot by hard links keeps the older file
            hidden_states.save(path)
            if self._durable:
                with disk_errors(self.folder):
                    fsync(path)
        all_agree(True)
        if is_first_process():
            text = self._key | asdict(progress) | {"slot": self._slot}
            write_text(self.folder / "progress.json", json.dumps(text) + "\n")
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - start

    def _clear(self) -> None:
        if is_first_process():
            shutil.rmtree(self.folder, ignore_errors=True)
        all_agree(True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _files(self) -> list[Path]:
        return [self.folder / f"{stream}-{rank()}-{self._slot}.safetensors" for stream in self._streams]

    def _read(self) -> _Saved | None:
        try:
            text = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if any(text.get(key) != value for key, value in self._key.items()):
            return None
        try:
            records = [LayerRecord.from_dict(record) for record in text["records"]]
        except TypeError:  # written by another version of llmprune
            return None
        return _Saved(Progress(records, text["scales"]), text["slot"])


def _load(path: Path, hidden_states: HiddenStates) -> None:
    """Replace all batches [B, L, D] by the saved windows in their order, on the device that computed them."""
    device = hidden_states.device
    windows = (window_1LD for saved_BLD in saved_batches(path) for window_1LD in torch.split(saved_BLD, 1))
    for batch in range(len(hidden_states)):
        hidden_states[batch] = torch.cat([*islice(windows, len(hidden_states[batch]))]).to(device)
