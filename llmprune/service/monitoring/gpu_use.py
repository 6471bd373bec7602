"""Use of NVIDIA GPUs as the driver's own program reports it; other vendors report nothing here."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence

from llmprune.service.monitoring.usage import GpuUse

_QUERY = "index,uuid,utilization.gpu,memory.used,memory.total"
_TIMEOUT = 10.0  # seconds
_MIB = 2**20


def gpu_use() -> list[tuple[str, GpuUse]]:
    """Return the UUID and the use of every GPU; empty where nvidia-smi does not run."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = csv.reader(answer.stdout.splitlines(), skipinitialspace=True)
    return [(row[1], _of_row(row)) for row in rows if len(row) == len(_QUERY.split(","))]


def use_of(devices: Sequence[str], found: Sequence[tuple[str, GpuUse]]) -> tuple[GpuUse, ...]:
    """Return the use of a job's GPUs, which it names by number or by the beginning of a UUID."""
    chosen = []
    for device in devices:
        match = [
            use for uuid, use in found if device == use.name or (not device.isdecimal() and uuid.startswith(device))
        ]
        chosen += [use.model_copy(update={"name": device}) for use in match[:1]]
    return tuple(chosen)


def _of_row(row: Sequence[str]) -> GpuUse:
    index, _, percent, used, total = row
    share = _number(percent)
    bytes_used, bytes_total = (
        None if (value := _number(text)) is None else int(value * _MIB) for text in (used, total)
    )
    return GpuUse(
        name=index,
        percent=None if share is None else min(share, 100.0),
        memory=bytes_used,
        total=bytes_total,
    )


def _number(text: str) -> float | None:
    """Return a number; None for ``[N/A]``, as a partitioned GPU reports."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value >= 0 else None
