"""The state of pass 2, kept every few layers or seconds, so that a killed run continues from there.

Beside the finished layers' files lie both streams as they left one of the last
finished layers, in two places by turns, and ``progress.json``, which is renamed into
place after everything that it speaks of. Whatever the instant of a kill, it names a
state that is whole. Keeping states takes 1 % of the time at most: where layers take
minutes each is kept, where they take seconds a few are done again.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.common.distributed import all_agree, broadcast_from_first, is_first_process, rank, world_size
from llmprune.common.files import write_text
from llmprune.layerwise.hidden_states import HiddenStates

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class MatrixRecord:
    """A matrix that was made sparse: the share of its weights that stay, and the relative error of what it writes.

    The error is against what the matrix would write with all its weights, on the calibration text; None where the
    method reads no XᵀX to tell it from.
    """

    name: str
    kept: float
    error: float | None


@dataclass(frozen=True)
class LayerRecord:
    """Relative error of the hidden states after a kept layer (and its gap), before and after its refit.

    ``ridge``, ``inherited`` and ``held_out`` are those of its ``Repair``; no ridge: it was better left as it is.
    ``error_cut`` is None where the dense hidden states were not needed, or nothing but the token mixer was refit, and
    counts that as done where it was.
    """

    layer: int
    error_cut: float | None
    error_refit: float | None
    ridge: float | None = None
    inherited: float | None = None
    held_out: float | None = None
    mixer_held_out: float | None = None  # of the token mixer's output projection, where it was solved
    up_held_out: float | None = None  # of the up projection, on other windows
    matrices: tuple[MatrixRecord, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerRecord:
        """Read back what ``dataclasses.asdict`` wrote to JSON."""
        return cls(**values | {"matrices": tuple(MatrixRecord(**one) for one in values["matrices"])})


def boot() -> str:
    """What tells one start of the machine from another, where it has that."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""


class Snapshots:
    """Pass 2's state in ``folder``, valid for one fingerprint and one number of processes.

    ``share``: the part of the time that keeping it may take.
    """

    def __init__(self, folder: Path, fingerprint: str, *, share: float = 0.01) -> None:
        self.folder, self.share = folder, share
        # Hidden states are not forced to disk at every layer: after a crash of the machine they are not trusted.
        self.scales: dict[str, float | None] = {}  # of pass 2, by class of layer: measured once in a run
        self._slot, self._kept_at, self._took = 0, -math.inf, 0.0
        self._key = {"fingerprint": fingerprint, "processes": world_size(), "boot": boot()}

    def records(self) -> list[LayerRecord]:
        """What is done already; empties the folder where that is nothing or not of this run. The same everywhere."""
        records, self.scales, self._slot = broadcast_from_first(self._read() if is_first_process() else ([], {}, 0))
        if not all_agree(all(path.is_file() for path in self._streams()) if records else True):
            records, self.scales = [], {}
        if not records:
            if is_first_process():
                shutil.rmtree(self.folder, ignore_errors=True)
            all_agree(True)
            self.folder.mkdir(parents=True, exist_ok=True)
        return records

    def restore(self, target: HiddenStates, stream: HiddenStates) -> None:
        """Put both streams where they were after the layers of ``records``."""
        for streams, path in zip((target, stream), self._streams(), strict=True):
            streams.load(path)

    def keep(self, records: list[LayerRecord], target: HiddenStates, *, stream: HiddenStates) -> None:
        """Note that one more layer is done, whose tensors are written already, if the last note is long enough ago."""
        start = time.monotonic()
        if not broadcast_from_first((start - self._kept_at) * self.share >= self._took):
            return
        self._slot = 1 - self._slot
        for streams, path in zip((target, stream), self._streams(), strict=True):
            streams.save(path)
        all_agree(True)
        if is_first_process():
            done = {"records": [asdict(record) for record in records], "scales": self.scales, "slot": self._slot}
            write_text(self.folder / "progress.json", json.dumps(self._key | done) + "\n")
        self._kept_at = time.monotonic()
        self._took = self._kept_at - start

    def _streams(self) -> tuple[Path, Path]:
        name = f"{rank()}-{self._slot}.safetensors"
        return self.folder / f"dense-{name}", self.folder / f"pruned-{name}"

    def _read(self) -> tuple[list[LayerRecord], dict[str, float | None], int]:
        try:
            text = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return [], {}, 0
        if any(text.get(key) != value for key, value in self._key.items()):
            return [], {}, 0
        try:
            records = [LayerRecord.from_dict(record) for record in text["records"]]
        except TypeError:  # of another version of llmprune
            return [], {}, 0
        return records, text["scales"], text["slot"]
