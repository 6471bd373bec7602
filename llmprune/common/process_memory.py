"""Memory of this process: peaks, and return of free heap memory to the system.

Peaks come from Linux or CUDA; other systems report none.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc/self")


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def trim() -> None:
    """Return free heap memory to the system: glibc keeps freed blocks below 32 MB, which add up over layers."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


def reset_peak() -> int:
    """Reset the peak to the bytes in use now and return them: GPU memory where there is a GPU, else resident memory.

    Returns 0 where the system does not report memory.
    """
    with suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return proc_field("status", "VmRSS:", unit=1024) or 0


def peak_memory() -> int:
    """Return the maximum bytes in use since ``reset_peak``; 0 where the system does not report memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident() or 0


def peak_resident() -> int | None:
    """Return the maximum bytes of resident memory since ``reset_peak``, mapped files included; None if unknown."""
    return proc_field("status", "VmHWM:", unit=1024)


def proc_field(file: str, name: str, *, unit: int = 1) -> int | None:
    """Return a field of ``/proc/self/FILE`` times ``unit``; None on systems without it."""
    try:
        lines = (_PROC / file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), None)
