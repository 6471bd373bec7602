"""Memory of this process: what is in use, the most that was, and what was let go handed back to the system.

Peaks come from Linux's own accounting, or from CUDA's; elsewhere there are none.
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
    """Hand free heap memory back: glibc keeps freed blocks below 32 MB, so that layers of such tensors pile up."""
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)


def reset_peak() -> int:
    """Let the peak begin at what is in use now, and say how much that is: GPU memory where there is one, else resident.

    0 where the system does not say.
    """
    with suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return proc_field("status", "VmRSS:", unit=1024) or 0


def peak_memory() -> int:
    """The most bytes in use since ``reset_peak``; 0 where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident() or 0


def peak_resident() -> int | None:
    """The most bytes of memory since the reset, mapped files included."""
    return proc_field("status", "VmHWM:", unit=1024)


def proc_field(file: str, name: str, *, unit: int = 1) -> int | None:
    """A number that Linux says about this process, in bytes; None elsewhere."""
    try:
        lines = (_PROC / file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(name)), None)
